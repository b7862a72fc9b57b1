//! Bytes that claim to be a safetensors file.

use super::assert_says;
use crate::bad_files::{claimed, entry, file, good_file, header, one_tensor};
use crate::oracle::{PATH, judge_header};

/// The sentence with which these bytes are refused.
#[track_caller]
fn refusal(bytes: &[u8]) -> String {
    match judge_header(bytes) {
        Ok(entries) => panic!("accepted: {entries:?}"),
        Err(error) => error.to_string(),
    }
}

#[test]
fn every_truncation_is_refused() {
    let good = good_file();
    let mut refused = 0;
    for length in 0..good.len() {
        assert_says(&refusal(&good[..length]), &[PATH, "expected"]);
        refused += 1;
    }
    assert_eq!(refused, good.len());
    assert_eq!(judge_header(&good).map(|e| e.len()).ok(), Some(3));
    let mut longer = good;
    longer.push(0);
    assert_says(&refusal(&longer), &["bytes by its header"]);
}

#[test]
fn every_changed_byte_is_refused_or_agreed_upon() {
    let good = good_file();
    let end = good.len() - 34;
    let (mut tried, mut accepted) = (0, 0);
    for at in 0..end {
        let mut bytes = good.clone();
        for change in 1..=255u8 {
            bytes[at] = good[at] ^ change;
            accepted += usize::from(judge_header(&bytes).is_ok());
            tried += 1;
        }
    }
    assert_eq!(tried, end * 255);
    // Other letters in a name are still a name, so some must pass; a changed number must not.
    assert!(
        (1000..tried / 10).contains(&accepted),
        "{accepted} of {tried} accepted"
    );
}

#[test]
fn every_byte_left_out_or_doubled_is_refused_or_agreed_upon() {
    let good = good_file();
    let json = &good[8..good.len() - 34];
    let mut tried = 0;
    for at in 0..json.len() {
        for part in [&[][..], &[json[at], json[at]][..]] {
            let changed = [&json[..at], part, &json[at + 1..]].concat();
            let _ = judge_header(&file(changed, 34));
            tried += 1;
        }
    }
    assert_eq!(tried, 2 * json.len());
}

#[test]
fn header_lengths_that_lie() {
    let json = header(&[entry("a", "U8", "[2]", 0, 2)]);
    let json = json.as_bytes();
    let n = json.len() as u64;
    let table: [(Vec<u8>, &str); 9] = [
        (Vec::new(), "expected at least 8 bytes, got 0"),
        (vec![1; 7], "expected at least 8 bytes, got 7"),
        (claimed(0, b"", 0), "EOF"),
        (
            claimed(u64::MAX, json, 2),
            "claims a header of 18446744073709551615 bytes",
        ),
        (
            claimed(1 << 63, json, 2),
            "claims a header of 9223372036854775808 bytes",
        ),
        (
            claimed(100_000_001, json, 2),
            "claims a header of 100000001 bytes",
        ),
        (
            claimed(100_000_000, json, 2),
            "expected 100000008 bytes by its header",
        ),
        (claimed(n - 1, json, 2), "EOF"),
        (claimed(n + 1, json, 2), "trailing characters"),
    ];
    let mut cases = 0;
    for (bytes, says) in &table {
        assert_says(&refusal(bytes), &[PATH, says]);
        cases += 1;
    }
    assert_eq!(cases, 9);
}

#[test]
fn offsets_and_shapes_that_lie() {
    let max = u64::MAX;
    let two = |a: (u64, u64), b: (u64, u64)| {
        header(&[
            entry("a", "U8", "[2]", a.0, a.1),
            entry("b", "U8", "[2]", b.0, b.1),
        ])
    };
    let one = |dtype: &str, shape: &str, to: u64| header(&[entry("a", dtype, shape, 0, to)]);
    let vast = |dims: usize| format!("[{}]", vec!["2"; dims].join(","));
    let table: [(String, usize, &[&str]); 22] = [
        (
            two((0, 2), (1, 3)),
            3,
            &["tensor b", "overlap", "start at 2, got 1"],
        ),
        (
            two((0, 2), (0, 2)),
            2,
            &["tensor b", "overlap", "start at 2, got 0"],
        ),
        (two((0, 2), (3, 5)), 5, &["tensor b", "hole", "start at 2, got 3"]),
        (two((1, 3), (3, 5)), 5, &["tensor a", "start at 0, got 1"]),
        (
            two((2, 0), (0, 2)),
            2,
            &["tensor a", "ends at 0, before it starts at 2"],
        ),
        (two((0, 2), (2, 4)), 3, &["bytes by its header"]),
        (two((0, 2), (2, 4)), 5, &["bytes by its header"]),
        (
            one("U8", "[3]", 2),
            2,
            &["tensor a", "expected 3 bytes for U8 [3], got 2"],
        ),
        (
            one("U8", "[]", 2),
            2,
            &["tensor a", "expected 1 bytes for U8 [], got 2"],
        ),
        (one("BF16", "[2,2]", 4), 4, &["tensor a", "expected 8 bytes"]),
        (
            one("U8", &format!("[{max},{max}]"), 1),
            1,
            &["tensor a", "overflows"],
        ),
        (one("U8", &format!("[{max}]"), max), 8, &["tensor a", "overflows"]),
        (
            one("F32", &format!("[{}]", max / 2 + 1), 0),
            0,
            &["tensor a", "overflows"],
        ),
        (
            one("U8", &format!("[{}]", isize::MAX), 8),
            8,
            &["tensor a", "overflows"],
        ),
        (
            one("U8", "[4294967296,4294967296]", 0),
            0,
            &["tensor a", "overflows"],
        ),
        (
            one("F32", &format!("[0,{max}]"), 0),
            0,
            &["tensor a", "overflows"],
        ),
        (
            one("U8", &vast(17), 1 << 17),
            1 << 17,
            &["tensor a", "17 dimensions; at most 16"],
        ),
        (
            one("U8", &vast(100_000), 1),
            1,
            &["tensor a", "100000 dimensions"],
        ),
        (
            one("F4", "[3]", 1),
            1,
            &["tensor a", "overflows or is not whole bytes"],
        ),
        (one("U8", "[18446744073709551616]", 2), 2, &["tensor a", "usize"]),
        // Nine tiles that together pass the largest number of 64 bits.
        (tiles(9), 8, &["tensor t8", "before it starts"]),
        (
            tiles(7),
            8,
            &["expected 16140901064495858402 bytes by its header"],
        ),
    ];
    let mut cases = 0;
    for (json, data, says) in &table {
        assert_says(&refusal(&file(json, *data)), &[&[PATH], *says].concat());
        cases += 1;
    }
    assert_eq!(cases, 22);
}

/// Tensors of 2^61 - 1 bytes, one after the other.
fn tiles(count: u64) -> String {
    let size = (1u64 << 61) - 1;
    let entries: Vec<String> = (0..count)
        .map(|i| {
            entry(
                &format!("t{i}"),
                "U8",
                &format!("[{size}]"),
                size * i,
                (i + 1).wrapping_mul(size),
            )
        })
        .collect();
    header(&entries)
}

#[test]
fn numbers_that_are_no_sizes() {
    let mut cases = 0;
    for number in [
        "-1", "1.0", "1e3", "2.5", "1e999", "-0", "null", "\"2\"", "[2]", "{}", "true",
    ] {
        for json in [
            header(&[entry("a", "U8", &format!("[{number}]"), 0, 2)]),
            header(&[entry("a", "U8", "[2]", 77, 2).replace("77", number)]),
            header(&[entry("a", "U8", "[2]", 0, 77).replace("77", number)]),
        ] {
            assert_says(&refusal(&file(json, 2)), &[PATH, "tensor a"]);
            cases += 1;
        }
    }
    assert_eq!(cases, 33);
}

#[test]
fn text_that_is_no_header() {
    let ok = r#""dtype":"U8","shape":[2],"data_offsets":[0,2]"#;
    let with = |extra: &str| format!(r#"{{"a":{{{ok},"x":{extra}}}}}"#).into_bytes();
    let mut not_utf8 = with("\"?\"");
    let at = not_utf8.iter().position(|&b| b == b'?').unwrap_or(0);
    not_utf8[at] = 0xff;
    let deep = |n: usize| "[".repeat(n);
    let table: [(Vec<u8>, &str); 22] = [
        (b"not json".to_vec(), "expected"),
        (b"[]".to_vec(), "JSON object"),
        (b"null".to_vec(), "JSON object"),
        (b"\"a\"".to_vec(), "JSON object"),
        (b"{".to_vec(), "EOF"),
        (vec![0xff; 16], "expected value"),
        (vec![0; 16], "expected value"),
        (not_utf8, "UTF-8"),
        (deep(100_000).into_bytes(), "JSON object"),
        (r#"{"a":"#.repeat(100_000).into_bytes(), "tensor a"),
        (format!(r#"{{"a":{}"#, deep(100_000)).into_bytes(), "tensor a"),
        // An unknown key is skipped, however deep; the reference reader refuses such a file.
        (with(&(deep(100_000) + &"]".repeat(100_000))), "recursion limit"),
        (with("1e999"), "out of range"),
        (with(r#""\ud800""#), "unexpected end of hex escape"),
        (
            format!(r#"{{"a":{{{ok},"dtype":"U8"}}}}"#).into_bytes(),
            "duplicate field",
        ),
        (
            br#"{"a":{"dtype":"U8","shape":[2]}}"#.to_vec(),
            "missing field `data_offsets`",
        ),
        (
            br#"{"a":{"dtype":"Q9","shape":[2],"data_offsets":[0,2]}}"#.to_vec(),
            "unknown variant `Q9`",
        ),
        (
            br#"{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2,3]}}"#.to_vec(),
            "tensor a",
        ),
        (br#"{"a\u001b[2J":{}}"#.to_vec(), "tensor a\\u{1b}[2J: missing"),
        (br#"{"a":{"dtype":"\n"}}"#.to_vec(), "unknown variant `\\n`"),
        (br#"{"__metadata__":{"a":1}}"#.to_vec(), "expected a string"),
        (
            br#"{"__metadata__":null,"__metadata__":null}"#.to_vec(),
            "__metadata__",
        ),
    ];
    let mut cases = 0;
    for (json, says) in &table {
        assert_says(&refusal(&file(json, 2)), &[PATH, says]);
        cases += 1;
    }
    assert_eq!(cases, 22);
}

#[test]
fn names_good_and_bad() {
    let long = "n".repeat(1024);
    let mut accepted = 0;
    for name in [
        "a/b",
        "../../etc/passwd",
        "C:\\\\x",
        "/",
        ".",
        " ",
        "层.权重",
        "a\\\"b",
        "{}",
        &long,
    ] {
        let entries = judge_header(&one_tensor(name));
        assert_eq!(entries.map(|e| e.len()).ok(), Some(1), "{name}");
        accepted += 1;
    }
    let longer = "n".repeat(1025);
    let vast = "n".repeat(1 << 20);
    let mut refused = 0;
    for (name, says) in [
        ("", "a name of 0 bytes; 1 to 1024 are accepted"),
        (longer.as_str(), "a name of 1025 bytes"),
        (vast.as_str(), "a name of 1048576 bytes"),
        ("a\\nb", "tensor a\\nb: a name with control characters"),
        ("\\u0000", "tensor \\u{0}: a name with control characters"),
        ("\\u001b[2J", "control characters"),
        ("\\u009b2J", "control characters"),
    ] {
        let message = refusal(&one_tensor(name));
        assert_says(&message, &[PATH, says]);
        assert!(message.len() < 600, "a message of {} bytes", message.len());
        refused += 1;
    }
    let twice = [entry("a", "U8", "[1]", 0, 1), entry("a", "U8", "[1]", 1, 2)];
    assert_says(
        &refusal(&file(header(&twice), 2)),
        &["tensor a", "names it twice"],
    );
    let escaped = [entry("a", "U8", "[1]", 0, 1), entry("\\u0061", "U8", "[1]", 1, 2)];
    assert_says(
        &refusal(&file(header(&escaped), 2)),
        &["tensor a", "names it twice"],
    );
    assert_eq!((accepted, refused), (10, 7));
}
