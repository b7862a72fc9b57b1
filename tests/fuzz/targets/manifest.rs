//! Fuzz target: any bytes as a manifest; whatever is accepted keeps the manifest's promises.
#![no_main]

#[path = "../oracle.rs"]
#[allow(dead_code)]
mod oracle;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let _ = oracle::judge_manifest(bytes);
});
