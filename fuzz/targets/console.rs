//! libFuzzer's way to [`fuzz::console`].

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzz::console::run(data));
