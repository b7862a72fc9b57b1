//! The house inspects itself: rules of `docs/architecture.md` that a compiler does not enforce.

use std::fs;
use std::path::{Path, PathBuf};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// All files below `folder` with one of these endings, build output left out.
fn files(folder: &Path, endings: &[&str], found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        if path.is_dir() {
            if !name.starts_with('.') && name != "target" {
                files(&path, endings, found);
            }
        } else if endings.iter().any(|e| name.ends_with(e)) {
            found.push(path);
        }
    }
}

fn sources() -> Vec<(String, String)> {
    sources_in(&[".rs"])
}

/// Path and text of all sources with one of these endings.
fn sources_in(endings: &[&str]) -> Vec<(String, String)> {
    let mut found = Vec::new();
    ["formats", "kernels", "calib", "src", "tests"]
        .iter()
        .for_each(|f| files(&root().join(f), endings, &mut found));
    let read = |p: PathBuf| {
        (
            p.strip_prefix(root()).unwrap().to_string_lossy().into_owned(),
            fs::read_to_string(&p).unwrap(),
        )
    };
    let all: Vec<_> = found.into_iter().map(read).collect();
    assert!(all.len() > 60, "only {} sources found", all.len());
    all
}

#[test]
fn no_file_is_longer_than_500_lines() {
    for (path, text) in sources_in(&[".rs", ".cu", ".cuh", ".cpp", ".h", ".py"]) {
        assert!(
            text.lines().count() <= 500,
            "{path} has {} lines; cut it by idea",
            text.lines().count()
        );
    }
}

#[test]
fn every_file_opens_by_saying_what_it_owns() {
    for (path, text) in sources() {
        assert!(
            text.starts_with("//!"),
            "{path} does not open with a paragraph about itself"
        );
    }
}

#[test]
fn no_drawers_for_odds_and_ends() {
    for (path, _) in sources() {
        let name = Path::new(&path)
            .file_stem()
            .unwrap()
            .to_string_lossy()
            .into_owned();
        assert!(
            !["utils", "util", "common", "helpers", "misc", "types", "manager"].contains(&name.as_str()),
            "{path}"
        );
    }
}

/// Places that may hold unsafe code; everything else is denied or forbidden to by lints, which
/// this keeps from being switched off quietly.
const UNSAFE_PLACES: [&str; 4] = [
    "formats/checkpoint/mmap.rs",
    "kernels/cpu/simd/",
    "kernels/cuda/launch.rs",
    "kernels/cuda/library.rs",
];

#[test]
fn unsafe_is_a_place() {
    let word = ["un", "safe"].concat();
    for (path, text) in sources() {
        let allowed = UNSAFE_PLACES.iter().any(|place| path.starts_with(place));
        let lifts = text.contains(&format!("allow({word}_code)"));
        let lifted_by_parent = path == "kernels/cpu/mod.rs";
        assert!(allowed || !lifts || lifted_by_parent, "{path} allows {word} code");
        let code = text
            .lines()
            .filter(|l| !l.trim_start().starts_with("//"))
            .any(|l| {
                [format!("{word} {{"), format!("{word} fn"), format!("{word} impl")]
                    .iter()
                    .any(|u| l.contains(u))
            });
        assert!(allowed || !code, "{path} holds {word} code");
    }
}

/// Nothing below the command line prints.
#[test]
fn only_the_command_line_prints() {
    let mut looked = 0;
    for (path, text) in sources() {
        let library = ["formats/", "kernels/", "calib/", "src/"]
            .iter()
            .any(|f| path.starts_with(f));
        if !library || path.starts_with("src/cli/") || path.contains("bench") || path.contains("/tests/") {
            continue;
        }
        looked += 1;
        let code = text.split("#[cfg(test)]").next().unwrap_or_default();
        assert!(
            !code.contains("println!") && !code.contains("eprint"),
            "{path} prints"
        );
    }
    assert!(looked > 40, "{looked}");
}

/// Numbers that come from a device mean nothing after a failure: outside the models themselves, which are asked when they
/// are done, everything asks as it reads.
#[test]
fn what_a_device_gave_is_asked_for() {
    let (mut looked, mut reads) = (0, 0);
    for (path, text) in sources() {
        if !path.starts_with("src/") || path.starts_with("src/model/") {
            continue;
        }
        looked += 1;
        reads += text.matches("backend().read(").count();
        assert!(
            !text.contains(".download("),
            "{path} takes numbers from a device without asking: use read"
        );
    }
    assert!(looked > 100 && reads > 4, "{looked} {reads}");
}

/// `formats` stands on the ground: it imports no other package of the house, and `kernels` only it.
#[test]
fn imports_point_downwards() {
    for (package, forbidden) in [
        ("formats", ["qtool_kernels", "qtool_calib", "qtool::"].as_slice()),
        ("kernels", &["qtool_calib", "qtool::"]),
        ("calib", &["qtool::"]),
    ] {
        let mut looked = 0;
        for (path, text) in sources().iter().filter(|(p, _)| p.starts_with(package)) {
            looked += 1;
            for name in forbidden {
                assert!(!text.contains(&format!("use {name}")), "{path} imports {name}");
            }
        }
        assert!(looked >= 7, "{package}: {looked}");
    }
}

/// Every path that documentation names in backquotes exists.
#[test]
fn paths_named_in_docs_exist() {
    let mut pages = Vec::new();
    files(&root().join("docs"), &[".md"], &mut pages);
    pages.push(root().join("README.md"));
    let tops = [
        "formats/", "kernels/", "calib/", "src/", "tests/", "docs/", ".ci/",
    ];
    let mut checked = 0;
    for page in &pages {
        let text = fs::read_to_string(page).unwrap();
        for quoted in text.split('`').skip(1).step_by(2) {
            let path = quoted.trim_end_matches('/');
            let plain =
                !path.contains([' ', '*', '{', '<', '\n']) && tops.iter().any(|top| quoted.starts_with(top));
            if plain {
                assert!(
                    root().join(path).exists(),
                    "{} names {path}, which does not exist",
                    page.display()
                );
                checked += 1;
            }
        }
    }
    assert!(
        pages.len() >= 3 && checked > 20,
        "{} pages, {checked} paths",
        pages.len()
    );
}
