//! `guest registers`: what a vCPU is at.

use anyhow::Result;
use sepal_schema::{
    debug_capnp::{debug, registers},
    error::Error,
    transport::Handle,
};
use serde_json::{Map, Value};

use crate::{
    args::{RegisterOptions, Registers},
    calls,
    manager::Manager,
    place::Place,
    show, status,
};

/// Registers on a line.
const ON_A_LINE: usize = 3;

/// `guest registers`.
pub(crate) async fn registers(handle: &Handle, place: &Place, args: &Registers) -> Result<u8> {
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
        Which::Registers(registers) => registers?,
        Which::Error(error) => return Err(Error::read(error?)?.into()),
    };
    let (wide, segments) = (wide(registers), segments(registers));
    let (level, halted) = (registers.get_cpl(), registers.get_halted());
    if options.json {
        let mut all = Map::new();
        // Too large for what many take JSON's numbers to be.
        all.extend(wide.map(|(name, value)| (name.to_owned(), Value::from(format!("{value:#x}")))));
        all.extend(segments.map(|(name, value)| (name.to_owned(), Value::from(format!("{value:#x}")))));
        all.insert("cpl".into(), level.into());
        all.insert("halted".into(), halted.into());
        show::print_json(&all)?;
        return Ok(status::SUCCESS);
    }
    let mut text = String::new();
    for line in wide.chunks(ON_A_LINE) {
        let cells: Vec<_> = line
            .iter()
            .map(|(name, value)| format!("{name:6} {value:016x}"))
            .collect();
        text.push_str(&format!("{}\n", cells.join("  ")));
    }
    let cells: Vec<_> = segments.map(|(name, value)| format!("{name} {value:04x}")).into();
    text.push_str(&format!("{}\n", cells.join("  ")));
    let halted = if halted {
        ", halted: it waits for an interrupt"
    } else {
        ""
    };
    text.push_str(&format!("privilege level {level}{halted}\n"));
    show::print(text.as_bytes())?;
    Ok(status::SUCCESS)
}

fn wide(from: registers::Reader<'_>) -> [(&'static str, u64); 26] {
    [
        ("rip", from.get_rip()),
        ("rsp", from.get_rsp()),
        ("rflags", from.get_rflags()),
        ("rax", from.get_rax()),
        ("rbx", from.get_rbx()),
        ("rcx", from.get_rcx()),
        ("rdx", from.get_rdx()),
        ("rsi", from.get_rsi()),
        ("rdi", from.get_rdi()),
        ("rbp", from.get_rbp()),
        ("r8", from.get_r8()),
        ("r9", from.get_r9()),
        ("r10", from.get_r10()),
        ("r11", from.get_r11()),
        ("r12", from.get_r12()),
        ("r13", from.get_r13()),
        ("r14", from.get_r14()),
        ("r15", from.get_r15()),
        ("cr0", from.get_cr0()),
        ("cr2", from.get_cr2()),
        ("cr3", from.get_cr3()),
        ("cr4", from.get_cr4()),
        ("cr8", from.get_cr8()),
        ("efer", from.get_efer()),
        ("fsBase", from.get_fs_base()),
        ("gsBase", from.get_gs_base()),
    ]
}

fn segments(from: registers::Reader<'_>) -> [(&'static str, u16); 6] {
    [
        ("cs", from.get_cs()),
        ("ds", from.get_ds()),
        ("es", from.get_es()),
        ("fs", from.get_fs()),
        ("gs", from.get_gs()),
        ("ss", from.get_ss()),
    ]
}
