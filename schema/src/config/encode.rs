//! Writes a configuration into a message.

use super::{File, GuestConfig, Handles, encode_devices as devices, upkeep};
use crate::{
    config_capnp::{Toggle, guest_config},
    error::Error,
    file_capnp,
};

impl GuestConfig {
    /// Writes the configuration; its descriptors travel by `handles`.
    ///
    /// # Errors
    /// Whatever `handles` says when the connection cannot carry a descriptor.
    pub fn encode(mut self, mut to: guest_config::Builder<'_>, handles: &dyn Handles) -> Result<(), Error> {
        to.set_name(&self.name);
        if let Some(id) = &self.instance_id {
            to.set_instance_id(id);
        }
        file(std::mem::take(&mut self.kernel), to.reborrow().init_kernel(), handles)?;
        file(std::mem::take(&mut self.initrd), to.reborrow().init_initrd(), handles)?;
        to.set_cmdline(&self.cmdline);
        to.set_cmdline_add(&self.cmdline_add[..])?;
        to.set_cpus(self.cpus);
        to.set_memory_mib(self.memory_mib);
        to.set_huge_pages(self.huge_pages);
        to.set_protected_vm(self.protected_vm);
        let mut ranges = to.reborrow().init_custom_memory(length(self.custom_memory.len()));
        for (i, range) in std::mem::take(&mut self.custom_memory).into_iter().enumerate() {
            let mut to = ranges.reborrow().get(length(i));
            to.reborrow().init_memfd().set_number(handles.send(range.memfd)?);
            to.set_start(range.start);
            to.set_end(range.end);
        }
        let mut limits = to.reborrow().init_limits();
        limits.set_memory_mib(self.limits.memory_mib);
        limits.set_cpu_percent(self.limits.cpu_percent);
        limits.set_cpu_weight(self.limits.cpu_weight);
        limits.set_tasks(self.limits.tasks);
        to.set_waived_layers(&self.waived_layers[..])?;
        upkeep::encode(&self, to.reborrow())?;
        self.encode_devices(to, handles)
    }

    fn encode_devices(self, mut to: guest_config::Builder<'_>, handles: &dyn Handles) -> Result<(), Error> {
        let has_vsock = self.vsock.is_some();
        devices::disks(self.disks, to.reborrow(), handles)?;
        devices::networks(self.networks, to.reborrow(), handles)?;
        if let Some(console) = self.console {
            let mut to = to.reborrow().init_console();
            to.set_enabled(Toggle::On);
            to.set_ports(console.ports);
            to.set_console_ports(console.console_ports);
        }
        if let Some(rng) = self.rng {
            let mut to = to.reborrow().init_rng();
            to.set_enabled(Toggle::On);
            devices::rate(rng.rate_limit, to.init_rate_limit());
        }
        if let Some(balloon) = self.balloon {
            let mut to = to.reborrow().init_balloon();
            to.set_enabled(Toggle::On);
            to.set_deflate_on_oom(balloon.deflate_on_oom);
            to.set_free_page_reporting(balloon.free_page_reporting);
        }
        if let Some(vsock) = self.vsock {
            devices::write_vsock(vsock, to.reborrow().init_vsock());
        }
        if let Some(device) = self.memory_device {
            let mut to = to.reborrow().init_memory_device();
            to.set_enabled(Toggle::On);
            to.set_block_size(device.block_size);
            to.set_region_size(device.region_size);
            to.set_region_alignment(device.region_alignment);
            to.set_requested(device.requested);
        }
        let mut shares = to.reborrow().init_shares(length(self.shares.len()));
        for (i, share) in self.shares.into_iter().enumerate() {
            devices::write_share(share, shares.reborrow().get(length(i)), handles)?;
        }
        let mut others = to.reborrow().init_vhost_user(length(self.vhost_user.len()));
        for (i, device) in self.vhost_user.into_iter().enumerate() {
            devices::write_vhost_user(device, others.reborrow().get(length(i)), handles)?;
        }
        if let Some(action) = self.watchdog {
            to.set_watchdog(Toggle::On);
            to.set_watchdog_action(action);
        }
        to.set_generation_id(devices::toggle(self.generation_id));
        to.set_panic_device(devices::toggle(self.panic_device));
        to.set_on_panic(self.on_panic);
        to.set_on_reset(self.on_reset);
        if has_vsock {
            to.set_agent(devices::toggle(self.agent));
        }
        Ok(())
    }
}

pub(super) fn file(file: File, mut to: file_capnp::file::Builder<'_>, handles: &dyn Handles) -> Result<(), Error> {
    match file {
        File::None => to.set_none(()),
        File::Fd(fd) => to.init_fd().set_number(handles.send(fd)?),
        File::Bytes(bytes) => to.set_bytes(&bytes),
        File::Upload(upload) => to.set_upload(upload),
        File::Path(path) => to.set_path(&path),
    }
    Ok(())
}

/// Lists of a configuration are bounded far below 2^32 entries wherever they are decoded.
pub(super) fn length(of: usize) -> u32 {
    u32::try_from(of).unwrap_or(u32::MAX)
}
