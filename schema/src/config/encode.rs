//! Writes a configuration into a message.

use super::{File, GuestConfig, Handles};
use crate::{config_capnp::guest_config, error::Error, file_capnp};

impl GuestConfig {
    /// Writes the configuration; its descriptors travel by `handles`.
    ///
    /// # Errors
    /// Whatever `handles` says when the connection cannot carry a descriptor.
    pub fn encode(self, mut to: guest_config::Builder<'_>, handles: &dyn Handles) -> Result<(), Error> {
        to.set_name(&self.name);
        file(self.kernel, to.reborrow().init_kernel(), handles)?;
        file(self.initrd, to.reborrow().init_initrd(), handles)?;
        to.set_cmdline(&self.cmdline);
        to.set_cmdline_add(&self.cmdline_add[..])?;
        to.set_cpus(self.cpus);
        to.set_memory_mib(self.memory_mib);
        to.set_huge_pages(self.huge_pages);
        let mut ranges = to.reborrow().init_custom_memory(length(self.custom_memory.len()));
        for (i, range) in self.custom_memory.into_iter().enumerate() {
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
        Ok(())
    }
}

fn file(file: File, mut to: file_capnp::file::Builder<'_>, handles: &dyn Handles) -> Result<(), Error> {
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
fn length(of: usize) -> u32 {
    u32::try_from(of).unwrap_or(u32::MAX)
}
