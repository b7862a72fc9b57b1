//! Fuzz target: any bytes as a safetensors file, judged by the format's own library.
#![no_main]

#[path = "../oracle.rs"]
#[allow(dead_code)]
mod oracle;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let _ = oracle::judge_header(bytes);
});
