//! `guest peek` and `guest stack`: a guest's memory, and the calls that a vCPU is in.

use anyhow::{Result, bail};
use sepal_schema::{debug_capnp::debug, error::Error, transport::Handle};
use serde::Serialize;

use crate::{
    args::{Peek, PeekOptions, Stack, StackOptions},
    calls,
    devices::fit,
    manager::Manager,
    place::Place,
    show, status,
    symbols::Symbols,
    table,
};

/// The most bytes that are read at once.
const PIECE: u64 = 65536;
/// Bytes on a line.
const ON_A_LINE: u64 = 16;

async fn debug(manager: &Manager, name: &str) -> Result<debug::Client> {
    let guest = calls::lookup(&manager.client, name).await?;
    Ok(guest.debug_request().send().pipeline.get_debug())
}

/// `guest peek`.
pub(crate) async fn peek(handle: &Handle, place: &Place, args: &Peek) -> Result<u8> {
    let manager = Manager::running(handle, place)?;
    memory(&debug(&manager, &args.name).await?, &args.options).await
}

/// `guest stack`.
pub(crate) async fn stack(handle: &Handle, place: &Place, args: &Stack) -> Result<u8> {
    let manager = Manager::running(handle, place)?;
    calls_of(&debug(&manager, &args.name).await?, &args.options).await
}

/// Prints memory, or where an address leads.
pub(crate) async fn memory(debug: &debug::Client, options: &PeekOptions) -> Result<u8> {
    if options.translate {
        return translate(debug, options).await;
    }
    let (mut address, mut left) = (options.address, options.length);
    while left > 0 {
        // At a multiple of what is on a line, so that lines are whole.
        let piece = left.min(PIECE - address % ON_A_LINE);
        let bytes = read(debug, options, address, piece as u32).await?;
        if bytes.len() as u64 != piece {
            bail!(
                "{piece} bytes from {address:#x} on were asked for, and {} came",
                bytes.len()
            );
        }
        let goes_on = match options.raw {
            true => show::print(&bytes)?,
            false => show::print(hex(address, &bytes).as_bytes())?,
        };
        if !goes_on {
            break;
        }
        left -= piece;
        address = address.wrapping_add(piece);
    }
    Ok(status::SUCCESS)
}

async fn read(debug: &debug::Client, options: &PeekOptions, address: u64, length: u32) -> Result<Vec<u8>> {
    use debug::memory_result::Which;
    let response = if options.physical {
        let mut request = debug.read_physical_request();
        request.get().set_address(address);
        request.get().set_length(length);
        request.send().promise.await?
    } else {
        let mut request = debug.read_virtual_request();
        request.get().set_vcpu(options.vcpu);
        request.get().set_address(address);
        request.get().set_length(length);
        request.send().promise.await?
    };
    match response.get()?.which()? {
        Which::Bytes(bytes) => Ok(bytes?.to_vec()),
        Which::Error(error) => Err(Error::read(error?)?.into()),
    }
}

async fn translate(debug: &debug::Client, options: &PeekOptions) -> Result<u8> {
    use debug::translate_result::Which;
    let mut request = debug.translate_request();
    request.get().set_vcpu(options.vcpu);
    request.get().set_address(options.address);
    let response = request.send().promise.await?;
    let found = match response.get()?.which()? {
        Which::Translation(found) => found?,
        Which::Error(error) => return Err(Error::read(error?)?.into()),
    };
    let mut may = vec!["read"];
    may.extend(found.get_writable().then_some("write"));
    may.extend(found.get_executable().then_some("execute"));
    let facts = [
        ("physical", format!("{:#x}", found.get_physical())),
        (
            "page",
            match found.get_page_size() {
                0 => "none: the vCPU uses no page tables".to_owned(),
                size => table::short(size),
            },
        ),
        ("may", may.join(", ")),
        (
            "by",
            match found.get_user() {
                true => "programs and kernel".to_owned(),
                false => "kernel".to_owned(),
            },
        ),
    ];
    show::print(table::facts(&facts).as_bytes())?;
    Ok(status::SUCCESS)
}

/// Bytes in hexadecimal and as characters, in lines that begin at multiples of what is on one.
fn hex(address: u64, bytes: &[u8]) -> String {
    let mut text = String::new();
    let (mut at, mut rest) = (address, bytes);
    while !rest.is_empty() {
        let begin = at % ON_A_LINE;
        let (line, after) = rest.split_at(rest.len().min((ON_A_LINE - begin) as usize));
        let mut cells = vec!["  ".to_owned(); begin as usize];
        cells.extend(line.iter().map(|byte| format!("{byte:02x}")));
        cells.resize(ON_A_LINE as usize, "  ".to_owned());
        let (first, second) = cells.split_at(cells.len() / 2);
        let shown = line.iter().map(|byte| {
            if byte.is_ascii_graphic() || *byte == b' ' {
                char::from(*byte)
            } else {
                '.'
            }
        });
        let shown: String = std::iter::repeat_n(' ', begin as usize).chain(shown).collect();
        text.push_str(&format!(
            "{:016x}  {}  {}  |{shown}|\n",
            at - begin,
            first.join(" "),
            second.join(" ")
        ));
        at = at.wrapping_add(line.len() as u64);
        rest = after;
    }
    text
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Frame {
    /// Too large for what many take JSON's numbers to be.
    address: String,
    stack_pointer: String,
    reliable: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    symbol: Option<String>,
}

#[derive(Debug, Serialize)]
struct Calls {
    frames: Vec<Frame>,
    end: String,
}

/// Prints the calls that a vCPU is in.
pub(crate) async fn calls_of(debug: &debug::Client, options: &StackOptions) -> Result<u8> {
    use debug::stack_result::Which;
    // Whatever is wrong with it is told before the guest is looked at.
    let symbols = options.symbols.as_deref().map(Symbols::read).transpose()?;
    let mut request = debug.stack_request();
    request.get().set_vcpu(options.vcpu);
    request.get().set_most(options.frames);
    let response = request.send().promise.await?;
    let stack = response.get()?;
    let frames = match stack.which()? {
        Which::Frames(frames) => frames?,
        Which::Error(error) => return Err(Error::read(error?)?.into()),
    };
    let frames = frames.iter().enumerate().map(|(i, frame)| {
        let address = frame.get_address();
        let symbol = symbols.as_ref().and_then(|symbols| match i {
            0 => symbols.of(address),
            _ => symbols.of_return(address),
        });
        Frame {
            address: format!("{address:#018x}"),
            stack_pointer: format!("{:#018x}", frame.get_stack_pointer()),
            reliable: frame.get_reliable(),
            symbol: symbol.map(|(name, offset)| format!("{name}+{offset:#x}")),
        }
    });
    let calls = Calls {
        frames: frames.collect(),
        end: fit(stack.get_end()?)?,
    };
    if options.json {
        show::print_json(&calls)?;
    } else {
        show::print(calls.text().as_bytes())?;
    }
    Ok(status::SUCCESS)
}

impl Calls {
    fn text(&self) -> String {
        let mut text = String::new();
        for (i, frame) in self.frames.iter().enumerate() {
            let doubt = if frame.reliable { ' ' } else { '?' };
            let symbol = frame.symbol.as_deref().unwrap_or_default();
            let line = format!("{i:3} {doubt} {}  {symbol}", frame.address);
            text.push_str(line.trim_end());
            text.push('\n');
        }
        text.push_str(&format!("{}\n", self.end));
        if self.frames.iter().any(|frame| !frame.reliable) {
            text.push_str("? looks like a call on the stack, which may have returned long ago\n");
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_shown_with_its_addresses_in_whole_lines() {
        let bytes: Vec<u8> = (0x3e..0x54).collect();
        let expected = "\
0000000000001000                                          3e 3f 40  |             >?@|
0000000000001010  41 42 43 44 45 46 47 48  49 4a 4b 4c 4d 4e 4f 50  |ABCDEFGHIJKLMNOP|
0000000000001020  51 52 53                                          |QRS|
";
        assert_eq!(hex(0x100d, &bytes), expected);
        assert_eq!(hex(0x1000, &[]), "");
        assert!(hex(u64::MAX, &[0]).starts_with("fffffffffffffff0 "));
    }

    #[test]
    fn calls_that_may_be_none_are_marked() {
        let frame = |address: &str, reliable, symbol: Option<&str>| Frame {
            address: address.to_owned(),
            stack_pointer: "0x1".to_owned(),
            reliable,
            symbol: symbol.map(str::to_owned),
        };
        let calls = Calls {
            frames: vec![
                frame("0xffffffff81000117", true, Some("do_idle+0x7")),
                frame("0xffffffff81000204", false, None),
            ],
            end: "a stack of 16 KiB ends at 0x4000".to_owned(),
        };
        let expected = "  0   0xffffffff81000117  do_idle+0x7
  1 ? 0xffffffff81000204
a stack of 16 KiB ends at 0x4000
? looks like a call on the stack, which may have returned long ago
";
        assert_eq!(calls.text(), expected);
    }
}
