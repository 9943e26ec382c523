//! The facts about the host as a message.

use sepal_schema::node_capnp::node_info;

use super::{Facts, findings::findings};
use crate::capacity::Used;

fn count(length: usize) -> u32 {
    u32::try_from(length).unwrap_or(u32::MAX)
}

/// Writes all of it.
pub(super) fn write(facts: &Facts, mut to: node_info::Builder<'_>) {
    to.set_host_name(&*facts.host_name);
    to.set_kernel(&*facts.kernel);
    to.set_version(env!("CARGO_PKG_VERSION"));
    to.set_cpu_model(&*facts.cpus.model);
    to.set_cpus(facts.cpus.online);
    to.set_usable_cpus(facts.usable_cpus);
    to.set_sockets(facts.cpus.sockets);
    to.set_cores_per_socket(facts.cpus.cores_per_socket);
    to.set_threads_per_core(facts.cpus.threads_per_core);
    to.set_mhz(facts.cpus.mhz);
    to.set_memory_bytes(facts.memory_bytes);
    to.set_free_bytes(facts.free_bytes);
    to.set_available_bytes(facts.room.available.unwrap_or(facts.free_bytes));
    cells(facts, to.reborrow());
    kvm(facts, to.reborrow().init_kvm());
    let layers: Vec<_> = facts.layers().collect();
    let mut list = to.reborrow().init_layers(count(layers.len()));
    for (i, (layer, offered, detail, remedy)) in (0..).zip(layers) {
        let mut to = list.reborrow().get(i);
        to.set_name(layer.name());
        to.set_offered(offered);
        to.set_detail(detail);
        to.set_remedy(remedy);
    }
    let found = findings(facts);
    let mut list = to.reborrow().init_findings(count(found.len()));
    for (i, finding) in (0..).zip(found) {
        let mut to = list.reborrow().get(i);
        to.set_severity(finding.severity);
        to.set_about(finding.about);
        to.set_what(&*finding.what);
        to.set_remedy(&*finding.remedy);
    }
    capacity(facts, to.init_capacity());
}

fn cells(facts: &Facts, to: node_info::Builder<'_>) {
    let mut list = to.init_cells(count(facts.cells.len()));
    for (i, cell) in (0..).zip(&facts.cells) {
        let mut to = list.reborrow().get(i);
        to.set_id(cell.id);
        to.set_memory_bytes(cell.memory_bytes);
        to.set_free_bytes(cell.free_bytes);
        let mut cpus = to.reborrow().init_cpus(count(cell.cpus.len()));
        for (i, cpu) in (0..).zip(&cell.cpus) {
            cpus.set(i, *cpu);
        }
        let mut distances = to.reborrow().init_distances(count(cell.distances.len()));
        for (i, distance) in (0..).zip(&cell.distances) {
            distances.set(i, *distance);
        }
        let mut pages = to.init_huge_pages(count(cell.huge_pages.len()));
        for (i, kind) in (0..).zip(&cell.huge_pages) {
            let mut to = pages.reborrow().get(i);
            to.set_size_bytes(kind.size_bytes);
            to.set_total(kind.total);
            to.set_free(kind.free);
        }
    }
}

fn kvm(facts: &Facts, mut to: node_info::kvm::Builder<'_>) {
    to.set_usable(facts.kvm.refused.is_none());
    if let Some((why, _)) = &facts.kvm.refused {
        to.set_detail(&**why);
    }
    to.set_api_version(facts.kvm.api_version);
    to.set_hardware(facts.hardware && facts.kvm.refused.is_none());
    to.set_max_vcpus(facts.kvm.max_vcpus);
    let mut list = to.init_capabilities(count(facts.kvm.capabilities.len()));
    for (i, capability) in (0..).zip(&facts.kvm.capabilities) {
        let mut to = list.reborrow().get(i);
        to.set_name(capability.name);
        to.set_value(capability.value);
        to.set_needed(capability.needed);
    }
}

fn capacity(facts: &Facts, mut to: node_info::capacity::Builder<'_>) {
    // Where there is no limit, no number could be reached.
    let most = |used: &Used| used.most.unwrap_or(u64::MAX);
    let (guests, room) = (&facts.guests, &facts.room);
    to.set_guests(u32::try_from(guests.used).unwrap_or(u32::MAX));
    to.set_max_guests(u32::try_from(most(guests)).unwrap_or(u32::MAX));
    to.set_descriptors(room.descriptors.used);
    to.set_max_descriptors(most(&room.descriptors));
    to.set_tasks(room.tasks.used);
    to.set_max_tasks(most(&room.tasks));
    to.set_memory_bytes(room.memory.used);
    to.set_max_memory_bytes(room.memory.most.unwrap_or(0));
}
