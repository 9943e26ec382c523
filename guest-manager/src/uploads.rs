//! Files that clients stream here because their connection carries no descriptors: kept in memory, sealed when they are finished.

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    future::Future,
    io::Write,
    os::fd::OwnedFd,
    rc::{Rc, Weak},
};

use capnp::capability::{FromClientHook, get_resolved_cap};
use sepal_schema::{
    error::{Error, Kind},
    file_capnp::upload,
    transport::guard,
};

use crate::{files, host};

/// Most bytes of one upload.
pub const MAX_SIZE: u64 = 4 << 30;
/// Most uploads of one connection at a time.
pub const MAX_UPLOADS: usize = 16;
/// Most bytes of one write.
pub const MAX_WRITE: usize = 64 * 1024;
/// How often, in bytes, an upload looks whether the host still has memory.
const MEMORY_STEP: u64 = 64 << 20;
/// Memory that uploads leave to the host, in MiB.
const MEMORY_LEFT: u64 = 256;

/// All uploads that clients hold, to recognize them when they come back in a configuration.
#[derive(Default)]
pub struct Uploads {
    known: RefCell<HashMap<usize, Weak<Upload>>>,
}

impl Uploads {
    /// Room for `size` bytes (0: not known). `count` counts the uploads of the client's connection.
    ///
    /// # Errors
    /// `NO_RESOURCES`.
    pub fn create(&self, size: u64, count: &Rc<Cell<usize>>) -> Result<upload::Client, Error> {
        let refuse = |message: String| Err(Error::new(Kind::NoResources, message).about("size"));
        if size > MAX_SIZE {
            return refuse(format!(
                "an upload of {size} bytes was asked for; at most {MAX_SIZE} are allowed"
            ));
        }
        if count.get() >= MAX_UPLOADS {
            return refuse(format!(
                "this connection has {MAX_UPLOADS} uploads; no more are allowed at a time"
            ));
        }
        if let Some(available) = host::available_mib()
            && (size >> 20).saturating_add(MEMORY_LEFT) > available
        {
            return refuse(format!(
                "an upload of {size} bytes does not fit: the host has {available} MiB of memory left"
            ));
        }
        let memory = files::new_memory("upload")?;
        let upload = Rc::new(Upload {
            content: RefCell::new(Content::Growing(memory)),
            size: Cell::new(0),
            limit: if size == 0 { MAX_SIZE } else { size },
            count: count.clone(),
        });
        count.set(count.get() + 1);
        let mut known = self.known.borrow_mut();
        known.retain(|_, upload| upload.strong_count() > 0);
        known.insert(Rc::as_ptr(&upload).addr(), Rc::downgrade(&upload));
        Ok(guard::new_client_from_rc(upload))
    }

    /// The content of a finished upload.
    ///
    /// # Errors
    /// `BAD_CONFIG` about `field` for one that is not finished, or none of ours.
    pub async fn content(&self, field: &str, client: upload::Client) -> Result<OwnedFd, Error> {
        let client = get_resolved_cap(client).await;
        // Held on to: the client may have let go of it with the message that names it.
        let hook = client.into_client_hook();
        let upload = self.known.borrow().get(&hook.get_ptr()).and_then(Weak::upgrade);
        let Some(upload) = upload else {
            return Err(Error::bad_config(
                field,
                format!("{field} names an upload that this manager does not have"),
            ));
        };
        match &*upload.content.borrow() {
            Content::Finished(content) => files::copy(field, content),
            Content::Growing(_) => Err(Error::bad_config(
                field,
                format!("{field} names an upload that is not finished: call finish first"),
            )),
            Content::Broken => Err(Error::bad_config(field, format!("{field} names an upload that failed"))),
        }
    }
}

enum Content {
    Growing(std::fs::File),
    Finished(OwnedFd),
    Broken,
}

struct Upload {
    content: RefCell<Content>,
    size: Cell<u64>,
    limit: u64,
    count: Rc<Cell<usize>>,
}

impl Upload {
    fn append(&self, bytes: &[u8]) -> Result<(), String> {
        let size = self.size.get();
        if bytes.len() > MAX_WRITE {
            return Err(format!(
                "{} bytes were written at once; at most {MAX_WRITE} are allowed",
                bytes.len()
            ));
        }
        let after = size + bytes.len() as u64;
        if after > self.limit {
            return Err(format!(
                "the upload has room for {} bytes, and more were written",
                self.limit
            ));
        }
        if size / MEMORY_STEP != after / MEMORY_STEP && host::available_mib().is_some_and(|mib| mib < MEMORY_LEFT) {
            return Err("the host has no memory left for the upload".to_owned());
        }
        match &mut *self.content.borrow_mut() {
            Content::Growing(memory) => memory.write_all(bytes).map_err(|error| format!("no memory: {error}"))?,
            Content::Finished(_) => return Err("the upload is finished: nothing can be appended".to_owned()),
            Content::Broken => return Err("the upload has failed".to_owned()),
        }
        self.size.set(after);
        Ok(())
    }

    fn finish(&self) -> Result<u64, String> {
        let mut content = self.content.borrow_mut();
        match std::mem::replace(&mut *content, Content::Broken) {
            Content::Growing(memory) => {
                *content = Content::Finished(files::seal("upload", memory).map_err(|error| error.message)?);
            }
            finished @ Content::Finished(_) => *content = finished,
            Content::Broken => return Err("the upload has failed".to_owned()),
        }
        Ok(self.size.get())
    }
}

impl Drop for Upload {
    fn drop(&mut self) {
        self.count.set(self.count.get() - 1);
    }
}

impl upload::Server for Upload {
    fn write(self: Rc<Self>, params: upload::WriteParams) -> impl Future<Output = Result<(), capnp::Error>> + 'static {
        let written = params.get().and_then(|params| {
            let appended = self.append(params.get_bytes()?);
            appended.map_err(|message| {
                // What is not complete must not be taken for it.
                *self.content.borrow_mut() = Content::Broken;
                capnp::Error::failed(message)
            })
        });
        futures::future::ready(written)
    }

    fn finish(
        self: Rc<Self>,
        _: upload::FinishParams,
        mut results: upload::FinishResults,
    ) -> impl Future<Output = Result<(), capnp::Error>> + 'static {
        let finished = Self::finish(&self).map_err(capnp::Error::failed);
        futures::future::ready(finished.map(|size| results.get().set_size(size)))
    }
}
