/*
 * The interface as a C++17 program uses it: handles that give themselves back, and a strongly sized enumeration.
 */
#include "avf_test.h"

#include <memory>
#include <string>
#include <thread>
#include <type_traits>
#include <vector>

namespace {

struct Release {
    void operator()(AVirtualMachineRawConfig *config) const { AVirtualMachineRawConfig_destroy(config); }
    void operator()(AVirtualizationService *service) const { AVirtualizationService_destroy(service); }
    void operator()(AVirtualMachine *vm) const { AVirtualMachine_destroy(vm); }
};

template <typename T>
using Handle = std::unique_ptr<T, Release>;

static_assert(std::is_same_v<std::underlying_type_t<AVirtualMachineStopReason>, std::int32_t>);

Handle<AVirtualMachineRawConfig> configuration(const std::string &commands) {
    Handle<AVirtualMachineRawConfig> config{AVirtualMachineRawConfig_create()};
    CHECK(AVirtualMachineRawConfig_setName(config.get(), "c++") == 0);
    AVirtualMachineRawConfig_setKernel(config.get(), kernel());
    AVirtualMachineRawConfig_setInitRd(config.get(), file_of(commands.data(), commands.size()));
    AVirtualMachineRawConfig_setMemoryMib(config.get(), 64);
    return config;
}

void runs(const AVirtualizationService *service) {
    int reading = -1, writing = -1;
    make_pipe(&reading, &writing);
    AVirtualMachine *made = nullptr;
    CHECK(AVirtualMachine_createRaw(service, configuration("say:hello,memory").release(), writing, -1, -1, &made) == 0);
    const Handle<AVirtualMachine> vm{made};
    CHECK(AVirtualMachine_start(vm.get()) == 0);
    Output console = output_of(reading);
    WAIT_FOR(&console, "ok say hello");
    const std::unique_ptr<char, decltype(&free)> line{LINE(&console, "ok memory"), free};
    CHECK(std::string{line.get()}.find("mib=64") != std::string::npos);
    AVirtualMachineStopReason reason{};
    const timespec timeout{10, 0};
    CHECK(AVirtualMachine_waitForStop(vm.get(), &timeout, &reason));
    CHECK(reason == AVIRTUAL_MACHINE_SHUTDOWN);
    output_end(&console);
}

} // namespace

int main() {
    begin_with_kvm();
    const Belongings before = belongings();
    {
        AVirtualizationService *made = nullptr;
        CHECK(AVirtualizationService_create(&made, false) == 0);
        const Handle<AVirtualizationService> service{made};
        std::vector<std::thread> threads;
        for (int index = 0; index < 2; index++) {
            threads.emplace_back(runs, service.get());
        }
        for (std::thread &thread : threads) {
            thread.join();
        }
        /* Never used. */
        configuration("");
    }
    NOTHING_LEFT(before);
}
