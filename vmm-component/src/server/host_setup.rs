//! What the guest manager tells and gives a component besides the configuration (`HostSetup` of lifecycle.capnp).

use std::os::fd::OwnedFd;

use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use rustix::net::{SocketType, sockopt};
use sepal_schema::{
    config::{Handles, device::MAX_CONSOLE_PORTS},
    error::Error,
    file_capnp::fd_ref,
    lifecycle_capnp::host_setup,
    transport::FdTable,
};

use super::teller::Lent;

/// What was told and given.
pub(super) struct Host {
    pub(super) unassisted: bool,
    pub(super) cpuid: Option<Vec<kvm_cpuid_entry2>>,
    pub(super) serial: Option<OwnedFd>,
    pub(super) consoles: Vec<OwnedFd>,
    pub(super) lent: Lent,
    /// Where the connections of managers to come arrive, for a durable guest.
    pub(super) successors: Option<OwnedFd>,
}

impl Host {
    /// Reads it, with the descriptors from `fds`.
    ///
    /// # Errors
    /// `BAD_CONFIG` naming the field.
    pub(super) fn read(from: host_setup::Reader<'_>, fds: &FdTable) -> Result<Self, Error> {
        use host_setup::serial::Which;
        let ports = from.get_consoles()?;
        if ports.len() > MAX_CONSOLE_PORTS.into() {
            let message = format!(
                "host.consoles has {} entries; a console has at most {MAX_CONSOLE_PORTS} ports",
                ports.len()
            );
            return Err(Error::bad_config("host.consoles", message));
        }
        let take = |fd: fd_ref::Reader<'_>| Handles::take(fds, fd.get_number());
        let consoles: Vec<_> = ports.iter().map(take).collect();
        let serial = match from.get_serial().which().map_err(capnp::Error::from)? {
            Which::None(()) => None,
            Which::Stream(fd) => Some(take(fd?).map_err(|error| error.about("host.serial"))?),
        };
        let successors = match from.has_successors() {
            true => Some(take(from.get_successors()?).map_err(|error| error.about("host.successors"))?),
            false => None,
        };
        let consoles = consoles.into_iter().collect::<Result<_, Error>>();
        Ok(Self {
            unassisted: from.get_unassisted(),
            cpuid: cpuid(from.get_cpuid()?)?,
            serial,
            consoles: consoles.map_err(|error| error.about("host.consoles"))?,
            lent: lent(from, fds)?,
            successors: match from.get_durable() {
                true => Some(checked(successors)?),
                false => None,
            },
        })
    }
}

/// What a manager lends to a guest that it did not create; it may give nothing else.
///
/// # Errors
/// `BAD_CONFIG` naming a field that is set nevertheless.
pub(super) fn lent_only(from: host_setup::Reader<'_>, fds: &FdTable) -> Result<Lent, Error> {
    use host_setup::serial::Which;
    let is_serial = !matches!(from.get_serial().which().map_err(capnp::Error::from)?, Which::None(()));
    let set = [
        ("unassisted", from.get_unassisted()),
        ("serial", is_serial),
        ("consoles", !from.get_consoles()?.is_empty()),
        ("cpuid", !from.get_cpuid()?.is_empty()),
        ("successors", from.has_successors()),
        ("durable", from.get_durable()),
    ];
    if let Some((field, _)) = set.into_iter().find(|(_, set)| *set) {
        let message = format!("host.{field} is for the manager that creates the guest");
        return Err(Error::bad_config(format!("host.{field}"), message));
    }
    lent(from, fds)
}

fn lent(from: host_setup::Reader<'_>, fds: &FdTable) -> Result<Lent, Error> {
    Ok(Lent {
        events: match from.has_events() {
            true => Some(from.get_events()?),
            false => None,
        },
        backends: match from.has_backends() {
            true => Some(from.get_backends()?),
            false => None,
        },
        fds: fds.clone(),
    })
}

/// A socket by which descriptors come one by one.
fn checked(successors: Option<OwnedFd>) -> Result<OwnedFd, Error> {
    let wrong = |message| Error::bad_config("host.successors", message);
    let socket = successors.ok_or_else(|| wrong("a durable guest needs a socket by which the next manager comes"))?;
    match sockopt::socket_type(&socket) {
        Ok(SocketType::SEQPACKET) => Ok(socket),
        _ => Err(wrong("host.successors is no socket of type SOCK_SEQPACKET")),
    }
}

/// Bytes of a `kvm_cpuid_entry2`.
const CPUID_ENTRY: usize = size_of::<kvm_cpuid_entry2>();

/// What the guest manager says that KVM offers of the processor.
fn cpuid(bytes: &[u8]) -> Result<Option<Vec<kvm_cpuid_entry2>>, Error> {
    if bytes.is_empty() {
        return Ok(None);
    }
    if !bytes.len().is_multiple_of(CPUID_ENTRY) || bytes.len() > KVM_MAX_CPUID_ENTRIES * CPUID_ENTRY {
        let message = format!("host.cpuid has {} bytes, which is no table of KVM's", bytes.len());
        return Err(Error::bad_config("host.cpuid", message));
    }
    let entry = |bytes: &[u8]| {
        let mut words = bytes
            .chunks_exact(4)
            .map(|word| u32::from_ne_bytes(word.try_into().unwrap_or_default()));
        let mut next = || words.next().unwrap_or_default();
        kvm_cpuid_entry2 {
            function: next(),
            index: next(),
            flags: next(),
            eax: next(),
            ebx: next(),
            ecx: next(),
            edx: next(),
            ..Default::default()
        }
    };
    Ok(Some(bytes.chunks_exact(CPUID_ENTRY).map(entry).collect()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_processor_offers_is_a_table_of_kvms_or_nothing() {
        assert!(cpuid(&[]).unwrap().is_none());
        let words: Vec<u8> = (1_u32..=20).flat_map(u32::to_ne_bytes).collect();
        let table = cpuid(&words).unwrap().unwrap();
        let [first, second] = table[..] else {
            panic!("{table:?}")
        };
        assert_eq!((first.function, first.index, first.flags), (1, 2, 3));
        assert_eq!((first.eax, first.ebx, first.ecx, first.edx), (4, 5, 6, 7));
        assert_eq!(second.function, 11);
        for wrong in [
            1,
            CPUID_ENTRY - 1,
            CPUID_ENTRY + 1,
            (KVM_MAX_CPUID_ENTRIES + 1) * CPUID_ENTRY,
        ] {
            let error = cpuid(&vec![0; wrong]).unwrap_err();
            assert_eq!(error.about, "host.cpuid");
        }
    }
}
