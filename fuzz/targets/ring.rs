//! libFuzzer's way to [`fuzz::ring`].

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzz::ring::run(data));
