//! Outputs appear under their name only when complete.
//!
//! A [`Staging`] folder is a hidden sibling of the target. Everything is written there and synced;
//! [`Staging::commit`] renames it into place in one step. Dropped uncommitted (an error, a ctrl-C),
//! it removes itself. A run that was killed leaves its staging folder behind; the next run for the
//! same target finds no one holding the lock beside it and clears it away.
//!
//! ```text
//! parent/OUT                      the target, absent or whole
//! parent/.OUT.qtool-partial/      being written
//! parent/.OUT.qtool-lock          held while a run lives, so that two runs cannot meet
//! ```

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use crate::artifact::MANIFEST_FILE;
use crate::export::PROVENANCE_FILE;
use crate::{FormatError, Result};

/// Index of a folder of statistics, as `qtool calibrate` writes it.
pub const STATISTICS_FILE: &str = "stats.json";

/// A folder under construction. See the module's text.
#[derive(Debug)]
pub struct Staging {
    target: PathBuf,
    folder: PathBuf,
    lock_path: PathBuf,
    _lock: File,
    force: bool,
    committed: bool,
}

impl Staging {
    /// Prepares to write `target`.
    ///
    /// Fails when it exists and is not an empty folder, unless `force` is set and qtool wrote it;
    /// when another run holds its lock; or when the parent folder cannot be written. Missing
    /// parents are created.
    pub fn begin(target: &Path, force: bool) -> Result<Self> {
        check_target(target, force)?;
        let parent = target
            .parent()
            .filter(|p| !p.as_os_str().is_empty())
            .unwrap_or(Path::new("."));
        fs::create_dir_all(parent).map_err(FormatError::io(parent, "create"))?;
        let Some(name) = target.file_name() else {
            return Err(FormatError::TargetForeign {
                path: target.to_owned(),
            });
        };
        let lock_path = parent.join(hidden(name, ".qtool-lock"));
        let lock = acquire(&lock_path, target)?;
        let folder = parent.join(hidden(name, ".qtool-partial"));
        let staging = Self {
            target: target.to_owned(),
            folder,
            lock_path,
            _lock: lock,
            force,
            committed: false,
        };
        if staging.folder.exists() {
            fs::remove_dir_all(&staging.folder).map_err(FormatError::io(&staging.folder, "clear away"))?;
        }
        fs::create_dir(&staging.folder).map_err(FormatError::io(&staging.folder, "create"))?;
        Ok(staging)
    }

    /// The folder to write into.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Where the folder will appear.
    pub fn target(&self) -> &Path {
        &self.target
    }

    /// Writes a small file into the folder and syncs it.
    pub fn write_file(&self, name: &str, bytes: &[u8]) -> Result<()> {
        write_file(&self.folder, name, bytes)
    }

    /// Copies a side file into the folder under its own name and syncs it.
    pub fn copy_file(&self, from: &Path) -> Result<PathBuf> {
        copy_file(&self.folder, from)
    }

    /// Makes a folder in the folder.
    pub fn subfolder(&self, name: &str) -> Result<PathBuf> {
        let path = self.folder.join(name);
        fs::create_dir(&path).map_err(FormatError::io(&path, "create"))?;
        Ok(path)
    }

    /// Renames the folder into place. With `force`, a former target is set aside first, put back
    /// when the rename fails, and removed when it succeeded.
    pub fn commit(mut self) -> Result<()> {
        check_target(&self.target, self.force)?;
        let aside = self.folder.with_extension("qtool-former");
        let replaces = self.target.exists();
        if replaces {
            fs::rename(&self.target, &aside).map_err(FormatError::io(&self.target, "set aside"))?;
        }
        if let Err(error) = fs::rename(&self.folder, &self.target) {
            if replaces {
                let _ = fs::rename(&aside, &self.target);
            }
            return Err(FormatError::io(&self.target, "move into place")(error));
        }
        self.committed = true;
        if let Some(parent) = self.target.parent() {
            // Makes the rename itself durable; not every file system can, so a refusal is no fault.
            let _ = File::open(parent).and_then(|folder| folder.sync_all());
        }
        if replaces {
            fs::remove_dir_all(&aside).map_err(FormatError::io(&aside, "remove"))?;
        }
        Ok(())
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        if !self.committed {
            let _ = fs::remove_dir_all(&self.folder);
        }
        let _ = fs::remove_file(&self.lock_path);
    }
}

/// Writes a small file into `folder` and syncs it.
pub fn write_file(folder: &Path, name: &str, bytes: &[u8]) -> Result<()> {
    let path = folder.join(name);
    let mut file = File::create(&path).map_err(FormatError::io(&path, "create"))?;
    file.write_all(bytes).map_err(FormatError::io(&path, "write"))?;
    file.sync_all().map_err(FormatError::io(&path, "sync"))
}

/// Copies a file into `folder` under its own name and syncs it.
pub fn copy_file(folder: &Path, from: &Path) -> Result<PathBuf> {
    let to = folder.join(from.file_name().unwrap_or_default());
    let mut source = File::open(from).map_err(FormatError::io(from, "open"))?;
    let mut copy = File::create(&to).map_err(FormatError::io(&to, "create"))?;
    io::copy(&mut source, &mut copy).map_err(FormatError::io(&to, "write"))?;
    copy.sync_all().map_err(FormatError::io(&to, "sync"))?;
    Ok(to)
}

/// Fails when writing `target` would lose something: see [`Staging::begin`].
pub fn check_target(target: &Path, force: bool) -> Result<()> {
    let Ok(mut listing) = fs::read_dir(target) else {
        return match target.symlink_metadata() {
            Err(_) => Ok(()),
            Ok(_) => Err(FormatError::TargetForeign {
                path: target.to_owned(),
            }),
        };
    };
    if listing.next().is_none() {
        return Ok(());
    }
    if !force {
        return Err(FormatError::TargetExists {
            path: target.to_owned(),
        });
    }
    let ours = [MANIFEST_FILE, PROVENANCE_FILE, STATISTICS_FILE]
        .iter()
        .any(|name| target.join(name).is_file());
    if ours {
        Ok(())
    } else {
        Err(FormatError::TargetForeign {
            path: target.to_owned(),
        })
    }
}

fn hidden(name: &std::ffi::OsStr, ending: &str) -> OsString {
    let mut hidden = OsString::from(".");
    hidden.push(name);
    hidden.push(ending);
    hidden
}

fn acquire(path: &Path, target: &Path) -> Result<File> {
    let lock = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .open(path)
        .map_err(FormatError::io(path, "create"))?;
    match lock.try_lock() {
        Ok(()) => Ok(lock),
        Err(TryLockError::WouldBlock) => Err(FormatError::TargetBusy {
            path: target.to_owned(),
        }),
        Err(TryLockError::Error(source)) => Err(FormatError::io(path, "lock")(source)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn appears_whole_or_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("out");
        let staging = Staging::begin(&target, false).unwrap();
        staging.write_file("a", b"1").unwrap();
        assert!(!target.exists());
        drop(staging);
        assert_eq!(
            fs::read_dir(dir.path()).unwrap().count(),
            0,
            "an abandoned run leaves nothing"
        );

        let staging = Staging::begin(&target, false).unwrap();
        staging.write_file(MANIFEST_FILE, b"{}").unwrap();
        staging.commit().unwrap();
        assert_eq!(fs::read(target.join(MANIFEST_FILE)).unwrap(), b"{}");
        assert_eq!(
            fs::read_dir(dir.path()).unwrap().count(),
            1,
            "no lock and no staging folder remain"
        );
    }

    #[test]
    fn two_runs_do_not_meet_and_a_killed_one_is_cleared() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("out");
        let first = Staging::begin(&target, false).unwrap();
        assert!(matches!(
            Staging::begin(&target, false),
            Err(FormatError::TargetBusy { .. })
        ));
        assert!(
            first.folder().is_dir(),
            "the refused run must not touch the other's folder"
        );
        drop(first);
        fs::create_dir(dir.path().join(".out.qtool-partial")).unwrap();
        fs::write(dir.path().join(".out.qtool-partial/junk"), b"x").unwrap();
        let staging = Staging::begin(&target, false).unwrap();
        assert_eq!(fs::read_dir(staging.folder()).unwrap().count(), 0);
    }

    #[test]
    fn force_replaces_only_what_qtool_wrote() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("out");
        fs::create_dir(&target).unwrap();
        fs::write(target.join("thesis.tex"), b"years of work").unwrap();
        assert!(matches!(
            Staging::begin(&target, false),
            Err(FormatError::TargetExists { .. })
        ));
        assert!(matches!(
            Staging::begin(&target, true),
            Err(FormatError::TargetForeign { .. })
        ));
        fs::write(target.join(MANIFEST_FILE), b"old").unwrap();
        let staging = Staging::begin(&target, true).unwrap();
        staging.write_file(MANIFEST_FILE, b"new").unwrap();
        staging.commit().unwrap();
        assert_eq!(fs::read(target.join(MANIFEST_FILE)).unwrap(), b"new");
        assert!(!target.join("thesis.tex").exists());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
