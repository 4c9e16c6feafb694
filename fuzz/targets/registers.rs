//! libFuzzer's way to [`fuzz::registers`].

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzz::registers::run(data));
