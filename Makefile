# What one does with this project. `make help` lists it; docs/testing.md tells what the suites are.

PRODUCTS := $(or $(CARGO_TARGET_DIR),target)

.PHONY: help
help:
	@echo 'make release    build the programs as they ship'
	@echo 'make run        boot a Linux guest whose root disk, network and console our daemons serve, and get it'
	@echo 'make test-fast  unit tests, conformance, an independent front end, User-Mode Linux guests'
	@echo 'make test       everything that a change must pass'
	@echo 'make fuzz       fuzz each target for 20 s (TIME=seconds, TARGET=one of them)'
	@echo 'make bench      measure against other back ends (OPTIONS=what tests/bench/run --help lists)'
	@echo 'make bench-net  the same for networks, as root (OPTIONS=what tests/bench/run net --help lists)'
	@echo 'make bench-vmm  the same for our VMM: its start and its memory, beside QEMU (ROUNDS=number)'
	@echo 'make install    install the programs and their units below PREFIX (/usr/local), in DESTDIR; make uninstall: take them away'
	@echo 'make deb        make a Debian package of them in target/debian'
	@echo 'make rig        fetch what guests are made of (the others do this by themselves)'

.PHONY: run
run: rig
	cargo build --release -p vhost-blk -p vhost-net -p vhost-console
	@tests/rig/run $(addprefix $(PRODUCTS)/release/,vhost-blk vhost-net vhost-console)

.PHONY: test
test:
	@tests/rig/suites all

.PHONY: test-fast
test-fast:
	@tests/rig/suites fast

# The targets: message, connection, session, ring, request, frame, console, control, registers (fuzz/src/lib.rs).
.PHONY: fuzz
fuzz:
	@TIME='$(TIME)' fuzz/run $(TARGET)

.PHONY: bench
bench: rig
	@tests/bench/run $(OPTIONS)

.PHONY: bench-net
bench-net: rig guest
	@tests/bench/run net $(OPTIONS)

# How often each machine boots.
ROUNDS := 5
.PHONY: bench-vmm
bench-vmm: rig guest
	cargo build -p vmm -p vhost-blk -p vhost-net -p vhost-console
	@OUTBOARD_FIGURES=$(ROUNDS) cargo test -q -p tests --test boot -- --nocapture --test-threads 1 vmm::figures vmm::no_request

# What ships, as it ships.
.PHONY: release
release:
	cargo build --release -p vhost-blk -p vhost-net -p vhost-console -p vmm

# As root there is no building: `make release` before `sudo make install` leaves nothing of root's in the tree.
PREFIX := /usr/local
.PHONY: install
install:
	@PREFIX='$(PREFIX)' DESTDIR='$(DESTDIR)' packaging/install '$(PRODUCTS)/release'

.PHONY: uninstall
uninstall:
	@PREFIX='$(PREFIX)' DESTDIR='$(DESTDIR)' packaging/install --remove

.PHONY: deb
deb: release
	@packaging/deb '$(PRODUCTS)/release'

.PHONY: rig
rig:
	@tests/rig/setup

# PID 1 of the test guests. Static: an initial RAM disk has no libraries. The target is named so that build scripts and
# procedural macros, which run here, are not linked that way too.
.PHONY: guest
guest:
	RUSTFLAGS='-C target-feature=+crt-static' cargo build -p guest --target x86_64-unknown-linux-gnu
