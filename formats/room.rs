//! Room for a file of known size, taken before it is written: a full disk is told at once, not when the work is nearly done,
//! and the file system need not find a place for every piece.

use std::fs::File;
use std::path::Path;

use crate::{FormatError, Result};

/// Makes `file` (which lies at `path`) `bytes` long and reserves the blocks for it. Where the file system cannot reserve,
/// nothing happens.
///
/// Fails when there is no room.
#[cfg(target_os = "linux")]
pub(crate) fn take(file: &File, path: &Path, bytes: u64) -> Result<()> {
    use rustix::fs::{FallocateFlags, fallocate};
    use rustix::io::Errno;
    if bytes == 0 {
        return Ok(());
    }
    match fallocate(file, FallocateFlags::empty(), 0, bytes) {
        Err(error @ (Errno::NOSPC | Errno::DQUOT | Errno::FBIG | Errno::IO)) => {
            Err(FormatError::io(path, "reserve room for")(error.into()))
        }
        // What else can be said is that it is not possible here.
        Ok(()) | Err(_) => Ok(()),
    }
}

/// See the module's text; elsewhere nothing is reserved.
#[cfg(not(target_os = "linux"))]
pub(crate) fn take(_file: &File, _path: &Path, _bytes: u64) -> Result<()> {
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_than_any_disk_holds_is_refused_in_words() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        let file = File::create(&path).unwrap();
        take(&file, &path, 100).unwrap();
        take(&file, &path, 0).unwrap();
        // Reserving makes the file longer, where it can be done.
        let can = file.metadata().unwrap().len() == 100;
        let too_much = take(&file, &path, 1 << 60);
        assert_eq!(too_much.is_err(), can, "{too_much:?}");
        if let Err(error) = too_much {
            let message = error.to_string();
            assert!(message.contains("f: cannot reserve room for"), "{message}");
        }
    }
}
