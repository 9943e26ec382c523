//! Users by name and number.

use std::{
    ffi::{CStr, CString},
    mem::MaybeUninit,
    ptr,
};

use anyhow::{Result, bail};

/// Room for what is known about a user; names are far shorter.
const ROOM: usize = 64 * 1024;

/// The number of a user who is given by number or name.
///
/// # Errors
/// There is none of that name.
pub(crate) fn uid(user: &str) -> Result<u32> {
    if let Ok(uid) = user.parse() {
        return Ok(uid);
    }
    let Ok(name) = CString::new(user) else {
        bail!("there is no user \"{}\" on this machine", user.escape_debug());
    };
    let found = look_up(
        // SAFETY: `look_up` passes pointers that are valid for the call, and the length of the room.
        |entry, room, length, found| unsafe { libc::getpwnam_r(name.as_ptr(), entry, room, length, found) },
        |entry| entry.pw_uid,
    );
    match found {
        Some(uid) => Ok(uid),
        None => bail!("there is no user \"{user}\" on this machine; a number names any"),
    }
}

/// The name of a user; the number where there is none.
pub(crate) fn name(uid: u32) -> String {
    let found = look_up(
        // SAFETY: `look_up` passes pointers that are valid for the call, and the length of the room.
        |entry, room, length, found| unsafe { libc::getpwuid_r(uid, entry, room, length, found) },
        // SAFETY: an entry that was found has a name that ends with a NUL, in the room that still lives.
        |entry| unsafe { CStr::from_ptr(entry.pw_name) }.to_string_lossy().into_owned(),
    );
    found.unwrap_or_else(|| uid.to_string())
}

/// Calls one of the functions that fill in an entry, and reads what is wanted of it.
fn look_up<T>(
    call: impl FnOnce(*mut libc::passwd, *mut libc::c_char, usize, *mut *mut libc::passwd) -> libc::c_int,
    read: impl FnOnce(&libc::passwd) -> T,
) -> Option<T> {
    let mut entry = MaybeUninit::<libc::passwd>::uninit();
    let mut room = vec![0; ROOM];
    let mut found = ptr::null_mut();
    let failed = call(entry.as_mut_ptr(), room.as_mut_ptr(), room.len(), &raw mut found);
    if failed != 0 || found.is_null() {
        return None;
    }
    // SAFETY: the call has said that it filled the entry.
    Some(read(unsafe { entry.assume_init_ref() }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn root_is_0_and_numbers_are_themselves() {
        assert_eq!(uid("root").unwrap(), 0);
        assert_eq!(name(0), "root");
        assert_eq!(uid("4000000000").unwrap(), 4_000_000_000);
        assert_eq!(name(4_000_000_000), "4000000000");
        assert!(uid("no-such-user").unwrap_err().to_string().contains("no-such-user"));
    }
}
