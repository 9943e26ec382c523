//! `guest registers`: what a vCPU is at.

use anyhow::Result;
use sepal_schema::{crash::Registers, debug_capnp::debug, error::Error, transport::Handle};
use serde_json::{Map, Value};

use crate::{
    args::{self, RegisterOptions},
    calls,
    manager::Manager,
    place::Place,
    show, status,
};

/// Registers on a line.
const ON_A_LINE: usize = 3;

/// `guest registers`.
pub(crate) async fn registers(handle: &Handle, place: &Place, args: &args::Registers) -> Result<u8> {
    let manager = Manager::running(handle, place)?;
    let guest = calls::lookup(&manager.client, &args.name).await?;
    let debug = guest.debug_request().send().pipeline.get_debug();
    show(&debug, &args.options).await
}

/// Shows the registers of a vCPU.
pub(crate) async fn show(debug: &debug::Client, options: &RegisterOptions) -> Result<u8> {
    use debug::registers_result::Which;
    let mut request = debug.registers_request();
    request.get().set_vcpu(options.vcpu);
    let response = request.send().promise.await?;
    let registers = match response.get()?.which()? {
        Which::Registers(registers) => Registers::read(registers?),
        Which::Error(error) => return Err(Error::read(error?)?.into()),
    };
    match options.json {
        true => show::print_json(&json(&registers))?,
        false => drop(show::print(lines(&registers).as_bytes())?),
    }
    Ok(status::SUCCESS)
}

/// The registers as JSON.
pub(crate) fn json(registers: &Registers) -> Map<String, Value> {
    let mut all = Map::new();
    // Too large for what many take JSON's numbers to be.
    let hexadecimal = |(name, value): (&str, u64)| (name.to_owned(), Value::from(format!("{value:#x}")));
    all.extend(wide(registers).map(hexadecimal));
    all.extend(segments(registers).map(|(name, value)| hexadecimal((name, value.into()))));
    all.insert("cpl".into(), registers.cpl.into());
    all.insert("halted".into(), registers.halted.into());
    all
}

/// The registers as people read them.
pub(crate) fn lines(registers: &Registers) -> String {
    let mut text = String::new();
    for line in wide(registers).chunks(ON_A_LINE) {
        let cells: Vec<_> = line
            .iter()
            .map(|(name, value)| format!("{name:6} {value:016x}"))
            .collect();
        text.push_str(&format!("{}\n", cells.join("  ")));
    }
    let cells: Vec<_> = segments(registers)
        .map(|(name, value)| format!("{name} {value:04x}"))
        .into();
    text.push_str(&format!("{}\n", cells.join("  ")));
    let halted = if registers.halted {
        ", halted: it waits for an interrupt"
    } else {
        ""
    };
    text.push_str(&format!("privilege level {}{halted}\n", registers.cpl));
    text
}

fn wide(from: &Registers) -> [(&'static str, u64); 26] {
    [
        ("rip", from.rip),
        ("rsp", from.rsp),
        ("rflags", from.rflags),
        ("rax", from.rax),
        ("rbx", from.rbx),
        ("rcx", from.rcx),
        ("rdx", from.rdx),
        ("rsi", from.rsi),
        ("rdi", from.rdi),
        ("rbp", from.rbp),
        ("r8", from.r8),
        ("r9", from.r9),
        ("r10", from.r10),
        ("r11", from.r11),
        ("r12", from.r12),
        ("r13", from.r13),
        ("r14", from.r14),
        ("r15", from.r15),
        ("cr0", from.cr0),
        ("cr2", from.cr2),
        ("cr3", from.cr3),
        ("cr4", from.cr4),
        ("cr8", from.cr8),
        ("efer", from.efer),
        ("fsBase", from.fs_base),
        ("gsBase", from.gs_base),
    ]
}

fn segments(from: &Registers) -> [(&'static str, u16); 6] {
    [
        ("cs", from.cs),
        ("ds", from.ds),
        ("es", from.es),
        ("fs", from.fs),
        ("gs", from.gs),
        ("ss", from.ss),
    ]
}
