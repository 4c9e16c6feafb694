//! What happens where a test cannot run: it says why, and fails where the environment says that it must run.

/// Whether a test that needs root's rights cannot run, for the test to return then; says what it needs them for. Unlike a
/// missing part, this is no failure where all tests must run: who is not root runs all that needs no root.
pub fn lacks_root(purpose: &str) -> bool {
    let lacks = !rustix::process::geteuid().is_root();
    if lacks {
        eprintln!("not run: {purpose} needs root");
    }
    lacks
}

/// Says why a test cannot run here, for the test to return after that.
///
/// # Panics
/// Where `REQUIRE_ALL=1` is set, as `make test` does: there a missing part is a failure, not a reason to skip.
pub fn cannot_run(reason: &str) {
    assert!(
        std::env::var_os("REQUIRE_ALL").is_none_or(|value| value != "1"),
        "REQUIRE_ALL=1, but this test cannot run: {reason}"
    );
    eprintln!("cannot run here: {reason}");
}
