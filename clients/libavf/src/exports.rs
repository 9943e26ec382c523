//! The C functions. Each does no more than to make values of pointers and descriptors, and errors of panics; the header has their documentation.
//!
//! Safety: as in C. Pointers are null, or lead to what the header says; handles are those that a function here returned and none has given back since;
//! descriptors that are taken are the caller's to give away.
#![expect(clippy::missing_safety_doc, reason = "one contract for all, above")]

use std::{
    ffi::{CStr, c_char, c_int},
    io,
    os::fd::OwnedFd,
    panic::{AssertUnwindSafe, catch_unwind},
    slice,
    time::Duration,
};

use sepal_schema::config::{INSTANCE_ID, MemoryBacking};

use crate::{
    config::{Disk, RawConfig, seal, take_fd},
    log,
    service::Service,
    streams::Ends,
    vm::Vm,
};

/// What is behind the handles is used by any thread, as the header says: no compiler sees that of pointers.
const _: () = {
    const fn by_several_at_once<T: Send + Sync>() {}
    const fn by_one_at_a_time<T: Send>() {}
    by_several_at_once::<Service>();
    by_several_at_once::<Vm>();
    by_one_at_a_time::<RawConfig>();
};

/// Runs `body`. No panic leaves it: that would end the program.
fn guarded<T>(otherwise: T, body: impl FnOnce() -> T) -> T {
    catch_unwind(AssertUnwindSafe(body)).unwrap_or(otherwise)
}

/// Sets a field of a configuration, if there is one.
unsafe fn set(config: *mut RawConfig, set: impl FnOnce(&mut RawConfig)) {
    // SAFETY: null, or a configuration that nobody else uses at this time.
    if let Some(config) = unsafe { config.as_mut() } {
        guarded((), || set(config));
    }
}

/// `AVirtualMachineRawConfig_create`.
#[unsafe(no_mangle)]
pub extern "C" fn AVirtualMachineRawConfig_create() -> *mut RawConfig {
    Box::into_raw(Box::default())
}

/// `AVirtualMachineRawConfig_destroy`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn AVirtualMachineRawConfig_destroy(config: *mut RawConfig) {
    if !config.is_null() {
        // SAFETY: it came from `create`, and nobody uses it after this.
        let config = unsafe { Box::from_raw(config) };
        guarded((), || drop(config));
    }
}

/// `AVirtualMachineRawConfig_setName`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn AVirtualMachineRawConfig_setName(config: *mut RawConfig, name: *const c_char) -> c_int {
    if config.is_null() || name.is_null() {
        return -libc::EINVAL;
    }
    // SAFETY: not null, so a string that ends with NUL.
    let Ok(name) = unsafe { CStr::from_ptr(name) }.to_str() else {
        return -libc::EINVAL;
    };
    // SAFETY: as the contract says.
    unsafe { set(config, |config| config.name = Some(name.to_owned())) };
    0
}

/// `AVirtualMachineRawConfig_setInstanceId`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn AVirtualMachineRawConfig_setInstanceId(
    config: *mut RawConfig,
    id: *const i8,
    size: usize,
) -> c_int {
    if config.is_null() || id.is_null() || size != INSTANCE_ID {
        return -libc::EINVAL;
    }
    // SAFETY: not null, so an array of the size that was checked.
    let bytes = unsafe { slice::from_raw_parts(id.cast::<u8>(), INSTANCE_ID) };
    // SAFETY: as the contract says.
    unsafe { set(config, |config| config.instance_id = bytes.try_into().ok()) };
    0
}

/// `AVirtualMachineRawConfig_setKernel`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn AVirtualMachineRawConfig_setKernel(config: *mut RawConfig, fd: c_int) {
    // SAFETY: as the contract says.
    let kernel = unsafe { take_fd(fd) };
    // SAFETY: as the contract says.
    unsafe { set(config, |config| config.kernel = kernel) };
}

/// `AVirtualMachineRawConfig_setInitRd`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn AVirtualMachineRawConfig_setInitRd(config: *mut RawConfig, fd: c_int) {
    // SAFETY: as the contract says.
    let initrd = unsafe { take_fd(fd) };
    // SAFETY: as the contract says.
    unsafe { set(config, |config| config.initrd = initrd) };
}

/// `AVirtualMachineRawConfig_addDisk`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn AVirtualMachineRawConfig_addDisk(config: *mut RawConfig, fd: c_int, writable: bool) -> c_int {
    // SAFETY: as the contract says.
    let image = unsafe { take_fd(fd) };
    match image {
        Some(image) if !config.is_null() => {
            // SAFETY: as the contract says.
            unsafe { set(config, |config| config.disks.push(Disk { image, writable })) };
            0
        }
        _ => -libc::EINVAL,
    }
}

/// `AVirtualMachineRawConfig_setMemoryMib`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn AVirtualMachineRawConfig_setMemoryMib(config: *mut RawConfig, mib: i32) {
    // SAFETY: as the contract says.
    unsafe { set(config, |config| config.memory_mib = mib) };
}

/// `AVirtualMachineRawConfig_setMemoryMiB`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn AVirtualMachineRawConfig_setMemoryMiB(config: *mut RawConfig, mib: i32) {
    // SAFETY: as the contract says.
    unsafe { AVirtualMachineRawConfig_setMemoryMib(config, mib) };
}

/// `AVirtualMachineRawConfig_setProtectedVm`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn AVirtualMachineRawConfig_setProtectedVm(config: *mut RawConfig, protected: bool) {
    // SAFETY: as the contract says.
    unsafe { set(config, |config| config.protected_vm = protected) };
}

/// `AVirtualMachineRawConfig_setBalloon`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn AVirtualMachineRawConfig_setBalloon(config: *mut RawConfig, balloon: bool) {
    // SAFETY: as the contract says.
    unsafe { set(config, |config| config.balloon = balloon) };
}

/// `AVirtualMachineRawConfig_setHypervisorSpecificAuthMethod`.
#[unsafe(no_mangle)]
pub extern "C" fn AVirtualMachineRawConfig_setHypervisorSpecificAuthMethod(_: *mut RawConfig, _: bool) -> c_int {
    -libc::ENOTSUP
}

/// `AVirtualMachineRawConfig_addCustomMemoryBackingFile`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn AVirtualMachineRawConfig_addCustomMemoryBackingFile(
    config: *mut RawConfig,
    fd: c_int,
    start: u64,
    end: u64,
) -> c_int {
    // SAFETY: as the contract says.
    let memfd = unsafe { take_fd(fd) };
    match memfd {
        Some(memfd) if !config.is_null() && start <= end => {
            seal(&memfd);
            // SAFETY: as the contract says.
            unsafe { set(config, |config| config.memory.push(MemoryBacking { memfd, start, end })) };
            0
        }
        _ => -libc::EINVAL,
    }
}

/// `AVirtualizationService_create`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn AVirtualizationService_create(service: *mut *mut Service, early: bool) -> c_int {
    if service.is_null() {
        return -libc::EINVAL;
    }
    let made = guarded(Err(libc::EIO), || {
        Service::new(early).map_err(|error| {
            log::say(&error.to_string());
            error.errno()
        })
    });
    match made {
        Ok(made) => {
            // SAFETY: not null, so a place for the handle.
            unsafe { service.write(Box::into_raw(Box::new(made))) };
            0
        }
        Err(errno) => -errno,
    }
}

/// `AVirtualizationService_destroy`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn AVirtualizationService_destroy(service: *mut Service) {
    if !service.is_null() {
        // SAFETY: it came from `create`, and nobody uses it after this.
        let service = unsafe { Box::from_raw(service) };
        guarded((), || service.destroy());
    }
}

/// Takes over the descriptors of a machine: console output, console input, log. Of one that is given twice, as a socket for both directions is, the
/// second is a copy.
unsafe fn take_ends([console_out, console_in, log]: [c_int; 3]) -> io::Result<Ends> {
    // SAFETY: as the contract says; no number is taken twice.
    let take = |number, others: &[c_int]| (!others.contains(&number)).then(|| unsafe { take_fd(number) })?;
    let mut ends = Ends {
        console_out: take(console_out, &[]),
        console_in: take(console_in, &[console_out]),
        log: take(log, &[console_out, console_in]),
    };
    let copy = |of: &Option<OwnedFd>| of.as_ref().map(OwnedFd::try_clone).transpose();
    if console_in == console_out {
        ends.console_in = copy(&ends.console_out)?;
    }
    if log == console_out {
        ends.log = copy(&ends.console_out)?;
    } else if log == console_in {
        ends.log = copy(&ends.console_in)?;
    }
    Ok(ends)
}

/// `AVirtualMachine_createRaw`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn AVirtualMachine_createRaw(
    service: *const Service,
    config: *mut RawConfig,
    console_out: c_int,
    console_in: c_int,
    log: c_int,
    vm: *mut *mut Vm,
) -> c_int {
    // SAFETY: as the contract says; all are taken, whatever comes of it.
    let ends = unsafe { take_ends([console_out, console_in, log]) };
    // SAFETY: null, or it came from `create`, and nobody uses it after this.
    let config = (!config.is_null()).then(|| unsafe { Box::from_raw(config) });
    // SAFETY: null, or a service that nobody destroys at this time.
    let (Some(service), Some(config), false) = (unsafe { service.as_ref() }, config, vm.is_null()) else {
        return -libc::EINVAL;
    };
    let made = guarded(None, || match ends {
        Ok(ends) => service.machine(*config, ends),
        Err(error) => {
            log::say(&format!("not created: copying a descriptor: {error}"));
            None
        }
    });
    match made {
        Some(made) => {
            // SAFETY: not null, so a place for the handle.
            unsafe { vm.write(Box::into_raw(Box::new(made))) };
            0
        }
        None => -libc::EIO,
    }
}

/// `AVirtualMachine_start`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn AVirtualMachine_start(vm: *mut Vm) -> c_int {
    // SAFETY: as the contract says.
    unsafe { done(vm, Vm::start) }
}

/// `AVirtualMachine_stop`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn AVirtualMachine_stop(vm: *mut Vm) -> c_int {
    // SAFETY: as the contract says.
    unsafe { done(vm, Vm::stop) }
}

/// What comes of something that is done with a machine.
unsafe fn done(vm: *mut Vm, what: impl FnOnce(&Vm) -> bool) -> c_int {
    // SAFETY: null, or a machine that nobody destroys at this time.
    let Some(vm) = (unsafe { vm.as_ref() }) else {
        return -libc::EINVAL;
    };
    match guarded(false, || what(vm)) {
        true => 0,
        false => -libc::EIO,
    }
}

/// `AVirtualMachine_waitForStop`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn AVirtualMachine_waitForStop(
    vm: *mut Vm,
    timeout: *const libc::timespec,
    reason: *mut i32,
) -> bool {
    // SAFETY: null, or a machine that nobody destroys at this time.
    let Some(vm) = (unsafe { vm.as_ref() }).filter(|_| !reason.is_null()) else {
        return false;
    };
    // SAFETY: null, or a time.
    let timeout = unsafe { timeout.as_ref() }.map(duration);
    match guarded(None, || vm.wait(timeout)) {
        Some(why) => {
            // SAFETY: not null, so a place for the reason.
            unsafe { reason.write(why as i32) };
            true
        }
        None => false,
    }
}

/// How long a timeout is; what is none does not wait.
fn duration(time: &libc::timespec) -> Duration {
    let nanoseconds = u32::try_from(time.tv_nsec)
        .ok()
        .filter(|nanoseconds| *nanoseconds < 1_000_000_000);
    match (u64::try_from(time.tv_sec), nanoseconds) {
        (Ok(seconds), Some(nanoseconds)) => Duration::new(seconds, nanoseconds),
        _ => Duration::ZERO,
    }
}

/// `AVirtualMachine_destroy`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn AVirtualMachine_destroy(vm: *mut Vm) {
    if !vm.is_null() {
        // SAFETY: it came from `createRaw`, and nobody uses it after this.
        let vm = unsafe { Box::from_raw(vm) };
        guarded((), || vm.destroy());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_timeout_that_is_none_does_not_wait() {
        let of = |tv_sec, tv_nsec| duration(&libc::timespec { tv_sec, tv_nsec });
        assert_eq!(of(1, 999_999_999), Duration::from_nanos(1_999_999_999));
        for (seconds, nanoseconds) in [(-1, 0), (0, -1), (1, 1_000_000_000)] {
            assert_eq!(of(seconds, nanoseconds), Duration::ZERO);
        }
    }
}
