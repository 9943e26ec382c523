//! What the limits need to know of a message, read from its content.

use capnp::{message::Reader, serialize::OwnedSegments, struct_list};
use capnp_rpc::rpc_capnp::{cap_descriptor, message, message_target, resolve, return_};

use super::Message;

/// Bytes of a peer's last words that are kept: every capability that breaks with the connection carries a copy, and logs do.
const MAX_REASON: usize = 512;

/// What counts in a received message.
pub(super) enum Content {
    Call {
        question: u32,
        /// The question on whose result it is called, where the caller does not have that yet.
        on: Option<u32>,
        capabilities: u32,
    },
    Bootstrap {
        question: u32,
    },
    Return {
        capabilities: u32,
    },
    Finish {
        question: u32,
        release: bool,
    },
    Release {
        id: u32,
        count: u32,
    },
    Abort(String),
    Other,
}

/// Finds what counts in a received message.
pub(super) fn inspect(reader: &Reader<OwnedSegments>) -> capnp::Result<Content> {
    let Ok(which) = reader.get_root::<message::Reader<'_>>()?.which() else {
        return Ok(Content::Other);
    };
    Ok(match which {
        message::Call(call) => {
            let call = call?;
            let capabilities = call.get_params()?.get_cap_table()?.len();
            let on = match call.get_target()?.which() {
                Ok(message_target::PromisedAnswer(answer)) => Some(answer?.get_question_id()),
                _ => None,
            };
            Content::Call {
                question: call.get_question_id(),
                on,
                capabilities,
            }
        }
        message::Bootstrap(bootstrap) => Content::Bootstrap {
            question: bootstrap?.get_question_id(),
        },
        message::Return(ret) => {
            let capabilities = match ret?.which() {
                Ok(return_::Results(payload)) => payload?.get_cap_table()?.len(),
                _ => 0,
            };
            Content::Return { capabilities }
        }
        message::Finish(finish) => {
            let finish = finish?;
            Content::Finish {
                question: finish.get_question_id(),
                release: finish.get_release_result_caps(),
            }
        }
        message::Release(release) => {
            let release = release?;
            Content::Release {
                id: release.get_id(),
                count: release.get_reference_count(),
            }
        }
        message::Abort(exception) => {
            let reason = exception?.get_reason()?.to_str().unwrap_or_default();
            Content::Abort(reason[..reason.floor_char_boundary(MAX_REASON)].replace(char::is_control, " "))
        }
        _ => Content::Other,
    })
}

pub(super) fn is_abort(message: &Message) -> bool {
    message
        .get_root_as_reader::<message::Reader<'_>>()
        .is_ok_and(|message| matches!(message.which(), Ok(message::Abort(_))))
}

/// Collects the capabilities that a message of ours hands out. For a return, gives its question and whether the peer
/// will finish it.
pub(super) fn exported(message: &Message, exports: &mut Vec<u32>) -> capnp::Result<Option<(u32, bool)>> {
    let Ok(which) = message.get_root_as_reader::<message::Reader<'_>>()?.which() else {
        return Ok(None);
    };
    match which {
        message::Call(call) => descriptors(call?.get_params()?.get_cap_table()?, exports)?,
        message::Resolve(resolve) => {
            if let Ok(resolve::Cap(cap)) = resolve?.which() {
                descriptor(cap?, exports);
            }
        }
        message::Return(ret) => {
            let ret = ret?;
            if let Ok(return_::Results(payload)) = ret.which() {
                descriptors(payload?.get_cap_table()?, exports)?;
            }
            return Ok(Some((ret.get_answer_id(), !ret.get_no_finish_needed())));
        }
        _ => (),
    }
    Ok(None)
}

fn descriptors(list: struct_list::Reader<'_, cap_descriptor::Owned>, exports: &mut Vec<u32>) -> capnp::Result<()> {
    for item in list {
        descriptor(item, exports);
    }
    Ok(())
}

fn descriptor(item: cap_descriptor::Reader<'_>, exports: &mut Vec<u32>) {
    if let Ok(cap_descriptor::SenderHosted(id) | cap_descriptor::SenderPromise(id)) = item.which() {
        exports.push(id);
    }
}
