//! A thread that makes durable what is written already, while more is being written: the disk is busy from the start, and
//! little is left to wait for at the end.

use std::fs::File;
use std::path::Path;
use std::sync::mpsc::{SyncSender, sync_channel};

use crate::{FormatError, Result};

/// Bytes after which it is worth asking.
pub(super) const SYNC_BYTES: u64 = 64 << 20;

/// Where files with much unsynced data are handed in.
pub(super) struct Due(SyncSender<File>);

impl Due {
    /// Takes a handle of a file, unless the thread is still busy with the one before: that one's successor will cover it.
    pub(super) fn offer(&self, file: File) {
        let _ = self.0.try_send(file);
    }
}

/// Does `work` with such a thread beside it. Fails with what `work` fails with, or else when data could not be made durable.
pub(super) fn beside<T>(path: &Path, work: impl FnOnce(Due) -> Result<T>) -> Result<T> {
    std::thread::scope(|scope| {
        let (due, files) = sync_channel::<File>(1);
        let syncing = scope.spawn(move || files.iter().try_for_each(|file| file.sync_data()));
        let done = work(Due(due));
        let synced = syncing
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        let done = done?;
        synced.map_err(FormatError::io(path, "sync"))?;
        Ok(done)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_and_its_errors_pass_through() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        let file = File::create(&path).unwrap();
        let count = beside(&path, |due| {
            for _ in 0..10 {
                due.offer(file.try_clone().unwrap());
            }
            Ok(10)
        });
        assert_eq!(count.unwrap(), 10);
        let fault = || FormatError::Scheme {
            got: "x".to_owned(),
            expected: "y".to_owned(),
        };
        assert!(beside(&path, |_| Err::<(), _>(fault())).is_err());
    }
}
