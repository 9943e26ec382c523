//! The messages of the vhost-user protocol that a front end sends, and the replies to them. Pure.
//!
//! A message is a header of three words (request, flags, size of the payload) and a payload, all in the machine's byte order; x86 is
//! little-endian. A reply has the number of its request. What a back end sends is decided on by its request alone: nothing in a reply
//! says how long it may be.

/// Bytes of a header.
pub const HEADER_BYTES: usize = 12;
/// Longest payload that a back end may send: the configuration space with its own header.
pub const PAYLOAD_MAX: usize = CONFIG_HEADER + CONFIG_MAX;
/// Most bytes of configuration space (VHOST_USER_MAX_CONFIG_SIZE).
pub const CONFIG_MAX: usize = 256;
/// Offset, size and flags before the bytes of configuration space.
const CONFIG_HEADER: usize = 12;
/// Most regions of a memory table: each takes a descriptor in one message (vhost-user, "Memory region description").
pub const REGIONS_MAX: usize = 8;

/// Flags of a header: version 1, and the bits that say what a message is.
const VERSION: u32 = 1;
const VERSION_MASK: u32 = 3;
const REPLY: u32 = 1 << 2;
const NEED_REPLY: u32 = 1 << 3;

/// Bits of the protocol features (vhost-user, "Protocol features").
pub mod protocol {
    /// More queues than a device of its kind has at least.
    pub const MQ: u64 = 1 << 0;
    /// The back end answers every message that asks for it, so that its refusals are seen.
    pub const REPLY_ACK: u64 = 1 << 3;
    /// The back end has the device's configuration space.
    pub const CONFIG: u64 = 1 << 9;
    /// The back end keeps what it has under way in memory that outlives it.
    pub const INFLIGHT: u64 = 1 << 12;
    /// The back end can reset the device.
    pub const RESET_DEVICE: u64 = 1 << 13;
    /// What this front end makes use of.
    pub const WANTED: u64 = MQ | REPLY_ACK | CONFIG | INFLIGHT | RESET_DEVICE;
}

/// VHOST_USER_F_PROTOCOL_FEATURES: a virtio feature bit that says that there are protocol features. Not the driver's business.
pub const FEATURE_PROTOCOL: u64 = 1 << 30;

/// A part of guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// First guest physical address.
    pub guest: u64,
    /// Bytes.
    pub size: u64,
    /// The address that the front end uses for it in ring addresses.
    pub user: u64,
    /// Where it begins in its file.
    pub offset: u64,
}

/// The memory in which a back end keeps what it has under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Inflight {
    /// Bytes.
    pub size: u64,
    /// Where it begins in its file.
    pub offset: u64,
    /// Number of queues.
    pub queues: u16,
    /// Entries of the longest one.
    pub queue_size: u16,
}

/// A message to the back end; descriptors travel beside it.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the protocol's own names; the fields are what it calls them")]
pub enum Request {
    GetFeatures,
    SetFeatures(u64),
    SetOwner,
    /// With one descriptor a region.
    SetMemTable(Vec<Region>),
    SetVringNum {
        queue: u16,
        entries: u16,
    },
    /// Addresses as [`Region::user`] counts.
    SetVringAddr {
        queue: u16,
        descriptors: u64,
        used: u64,
        available: u64,
    },
    SetVringBase {
        queue: u16,
        base: u16,
    },
    GetVringBase {
        queue: u16,
    },
    /// With the eventfd.
    SetVringKick {
        queue: u16,
    },
    /// With the eventfd.
    SetVringCall {
        queue: u16,
    },
    GetProtocolFeatures,
    SetProtocolFeatures(u64),
    GetQueueNum,
    SetVringEnable {
        queue: u16,
        enable: bool,
    },
    /// So many bytes from the first on.
    GetConfig {
        len: usize,
    },
    SetConfig {
        offset: usize,
        bytes: Vec<u8>,
    },
    GetInflightFd {
        queues: u16,
        queue_size: u16,
    },
    /// With its descriptor.
    SetInflightFd(Inflight),
    ResetDevice,
}

/// What a request is answered with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expected {
    /// A number.
    Value,
    /// A queue and a number.
    VringState,
    /// Configuration space of this many bytes; without any, the back end cannot tell.
    Config {
        /// Bytes asked for.
        len: usize,
    },
    /// A place for what is under way; beside it its descriptor.
    Inflight,
    /// 0 if all is well, because it was asked to confirm.
    Ack,
}

/// What the back end said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    /// A number.
    Value(u64),
    /// The next entry of the available ring that a queue's back end would take.
    Base {
        /// The queue.
        queue: u32,
        /// The entry.
        base: u32,
    },
    /// Configuration space.
    Config(Vec<u8>),
    /// A place for what is under way.
    Inflight(Inflight),
    /// It did as it was told.
    Done,
}

/// A reply that is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadReply {
    /// Not version 1, or not marked as a reply.
    #[error("flags {0:#x} where a reply was expected")]
    Flags(u32),
    /// The reply to something else.
    #[error("a reply to request {got} where one to {wanted} was expected")]
    Request {
        /// The number in the reply.
        got: u32,
        /// The number of the oldest request without a reply.
        wanted: u32,
    },
    /// Not of the length that the request calls for.
    #[error("{0} bytes of payload")]
    Size(u32),
    /// It could not, or would not.
    #[error("error {0}")]
    Refused(u64),
    /// It has no configuration space to show.
    #[error("no configuration")]
    NoConfig,
    /// A field contradicts the request.
    #[error("a contradiction in its fields")]
    Fields,
}

/// A header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Number of the request.
    pub request: u32,
    /// Flags.
    pub flags: u32,
    /// Bytes of the payload.
    pub size: u32,
}

impl Header {
    /// Reads a header.
    pub fn decode(bytes: [u8; HEADER_BYTES]) -> Self {
        let mut fields = Fields(&bytes);
        Self {
            request: fields.word().unwrap_or(0),
            flags: fields.word().unwrap_or(0),
            size: fields.word().unwrap_or(0),
        }
    }

    /// Checks that this begins the reply to the request with number `wanted`, and how long its payload is.
    ///
    /// # Errors
    ///
    /// [`BadReply`].
    pub fn check(&self, wanted: u32, expected: Expected) -> Result<usize, BadReply> {
        if self.flags & (VERSION_MASK | REPLY) != VERSION | REPLY {
            return Err(BadReply::Flags(self.flags));
        }
        if self.request != wanted {
            return Err(BadReply::Request {
                got: self.request,
                wanted,
            });
        }
        let size = usize::try_from(self.size).unwrap_or(usize::MAX);
        let legal = match expected {
            Expected::Value | Expected::VringState | Expected::Ack => size == 8,
            Expected::Config { len } => size == CONFIG_HEADER + len || size <= CONFIG_HEADER,
            // The structure has 20 bytes, and 24 where a compiler aligned its end.
            Expected::Inflight => size == 20 || size == 24,
        };
        if legal {
            Ok(size)
        } else {
            Err(BadReply::Size(self.size))
        }
    }
}

impl Request {
    /// Its number and name.
    fn identity(&self) -> (u32, &'static str) {
        match self {
            Self::GetFeatures => (1, "GET_FEATURES"),
            Self::SetFeatures(_) => (2, "SET_FEATURES"),
            Self::SetOwner => (3, "SET_OWNER"),
            Self::SetMemTable(_) => (5, "SET_MEM_TABLE"),
            Self::SetVringNum { .. } => (8, "SET_VRING_NUM"),
            Self::SetVringAddr { .. } => (9, "SET_VRING_ADDR"),
            Self::SetVringBase { .. } => (10, "SET_VRING_BASE"),
            Self::GetVringBase { .. } => (11, "GET_VRING_BASE"),
            Self::SetVringKick { .. } => (12, "SET_VRING_KICK"),
            Self::SetVringCall { .. } => (13, "SET_VRING_CALL"),
            Self::GetProtocolFeatures => (15, "GET_PROTOCOL_FEATURES"),
            Self::SetProtocolFeatures(_) => (16, "SET_PROTOCOL_FEATURES"),
            Self::GetQueueNum => (17, "GET_QUEUE_NUM"),
            Self::SetVringEnable { .. } => (18, "SET_VRING_ENABLE"),
            Self::GetConfig { .. } => (24, "GET_CONFIG"),
            Self::SetConfig { .. } => (25, "SET_CONFIG"),
            Self::GetInflightFd { .. } => (31, "GET_INFLIGHT_FD"),
            Self::SetInflightFd(_) => (32, "SET_INFLIGHT_FD"),
            Self::ResetDevice => (34, "RESET_DEVICE"),
        }
    }

    /// Its number.
    pub fn number(&self) -> u32 {
        self.identity().0
    }

    /// Its name in the protocol, for people.
    pub fn name(&self) -> &'static str {
        self.identity().1
    }

    /// What answers it; `None`: nothing, unless the back end is asked to confirm.
    pub fn expected(&self) -> Option<Expected> {
        match *self {
            Self::GetFeatures | Self::GetProtocolFeatures | Self::GetQueueNum => Some(Expected::Value),
            Self::GetVringBase { .. } => Some(Expected::VringState),
            Self::GetConfig { len } => Some(Expected::Config { len }),
            Self::GetInflightFd { .. } => Some(Expected::Inflight),
            _ => None,
        }
    }

    /// The message. `confirm`: the back end is to answer also if the request has no reply of its own.
    pub fn encode(&self, confirm: bool) -> Vec<u8> {
        let mut payload = Payload(Vec::with_capacity(64));
        match self {
            Self::GetFeatures | Self::SetOwner | Self::GetProtocolFeatures | Self::GetQueueNum | Self::ResetDevice => {}
            Self::SetFeatures(features) | Self::SetProtocolFeatures(features) => payload.long(*features),
            Self::SetMemTable(regions) => {
                // At most `REGIONS_MAX`.
                payload.words([regions.len() as u32, 0]);
                for region in regions {
                    payload.longs([region.guest, region.size, region.user, region.offset]);
                }
            }
            Self::SetVringNum { queue, entries } => payload.words([(*queue).into(), (*entries).into()]),
            Self::SetVringAddr {
                queue,
                descriptors,
                used,
                available,
            } => {
                payload.words([(*queue).into(), 0]);
                // The last is for logging writes, which is off.
                payload.longs([*descriptors, *used, *available, 0]);
            }
            Self::SetVringBase { queue, base } => payload.words([(*queue).into(), (*base).into()]),
            Self::GetVringBase { queue } => payload.words([(*queue).into(), 0]),
            // The queue's number; a further bit would say that there is no descriptor.
            Self::SetVringKick { queue } | Self::SetVringCall { queue } => payload.long((*queue).into()),
            Self::SetVringEnable { queue, enable } => payload.words([(*queue).into(), (*enable).into()]),
            Self::GetConfig { len } => {
                payload.words([0, *len as u32, 0]);
                payload.0.resize(CONFIG_HEADER + len, 0);
            }
            Self::SetConfig { offset, bytes } => {
                payload.words([*offset as u32, bytes.len() as u32, 0]);
                payload.0.extend_from_slice(bytes);
            }
            Self::GetInflightFd { queues, queue_size } => payload.inflight(&Inflight {
                size: 0,
                offset: 0,
                queues: *queues,
                queue_size: *queue_size,
            }),
            Self::SetInflightFd(inflight) => payload.inflight(inflight),
        }
        let flags = VERSION | if confirm { NEED_REPLY } else { 0 };
        let mut message = Payload(Vec::with_capacity(HEADER_BYTES + payload.0.len()));
        message.words([self.number(), flags, payload.0.len() as u32]);
        message.0.append(&mut payload.0);
        message.0
    }
}

impl Reply {
    /// Reads the payload of a reply whose header was checked.
    ///
    /// # Errors
    ///
    /// [`BadReply`].
    pub fn decode(expected: Expected, payload: &[u8]) -> Result<Self, BadReply> {
        // A payload of a legal length has all of the fields.
        let short = BadReply::Size(payload.len() as u32);
        let mut fields = Fields(payload);
        Ok(match expected {
            Expected::Value => Self::Value(fields.long().ok_or(short)?),
            Expected::Ack => match fields.long().ok_or(short)? {
                0 => Self::Done,
                error => return Err(BadReply::Refused(error)),
            },
            Expected::VringState => Self::Base {
                queue: fields.word().ok_or(short)?,
                base: fields.word().ok_or(short)?,
            },
            Expected::Config { len } => {
                let Some(bytes) = payload.get(CONFIG_HEADER..).filter(|bytes| bytes.len() == len) else {
                    return Err(BadReply::NoConfig);
                };
                let place = (fields.word(), fields.word());
                if place != (Some(0), u32::try_from(len).ok()) {
                    return Err(BadReply::Fields);
                }
                Self::Config(bytes.to_vec())
            }
            Expected::Inflight => Self::Inflight(Inflight {
                size: fields.long().ok_or(short)?,
                offset: fields.long().ok_or(short)?,
                queues: fields.half().ok_or(short)?,
                queue_size: fields.half().ok_or(short)?,
            }),
        })
    }
}

/// Bytes that grow.
struct Payload(Vec<u8>);

impl Payload {
    fn words<const N: usize>(&mut self, words: [u32; N]) {
        self.0.extend(words.into_iter().flat_map(u32::to_le_bytes));
    }

    fn long(&mut self, long: u64) {
        self.longs([long]);
    }

    fn longs<const N: usize>(&mut self, longs: [u64; N]) {
        self.0.extend(longs.into_iter().flat_map(u64::to_le_bytes));
    }

    fn inflight(&mut self, inflight: &Inflight) {
        self.longs([inflight.size, inflight.offset]);
        let halves = [inflight.queues, inflight.queue_size, 0, 0];
        self.0.extend(halves.into_iter().flat_map(u16::to_le_bytes));
    }
}

/// Bytes that are read from the front.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (first, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*first)
    }

    fn half(&mut self) -> Option<u16> {
        self.take().map(u16::from_le_bytes)
    }

    fn word(&mut self) -> Option<u32> {
        self.take().map(u32::from_le_bytes)
    }

    fn long(&mut self) -> Option<u64> {
        self.take().map(u64::from_le_bytes)
    }
}

#[cfg(test)]
mod tests;
