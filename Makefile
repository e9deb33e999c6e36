# The one index of commands: `make help`. Every target sets up what it needs; a second run is quick.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-builtin-rules

# The system's own Python: Debian's python3-bpfcc and the packaged units use the same one.
PYTHON ?= /usr/bin/python3
VENV := .venv
BIN := $(VENV)/bin

# What a bare Debian 12 lacks. Building: python3-venv to llvm. Running and the lab: iproute2 to
# openssl. Tests and bench: the rest (systemd for systemd-analyze, which needs no running systemd).
SYSTEM_PACKAGES := python3-venv python3-dev gcc pkg-config libnghttp2-dev libbpf-dev clang llvm \
	iproute2 iptables nftables procps curl openssl \
	clang-format libclang-rt-14-dev systemd tcpdump iperf3 wrk netcat-openbsd \
	chromium chromium-driver fonts-dejavu-core fish zsh mandoc python3-bpfcc
# For the page's library. Not by their packages' names: what has npm from elsewhere keeps it.
ifeq ($(shell command -v npm),)
SYSTEM_PACKAGES += nodejs npm
endif

C_SOURCES := $(wildcard ztunnel/_core/*.[ch] nodeagent/capture/*.[ch])
BPF_SOURCES := $(wildcard bpf/*.bpf.c bpf/*.h bpf/include/*.h)
# Compiled by bcc, when it is used.
TRACE_SOURCES := $(wildcard nodeagent/trace/*.c)
TEST_C_SOURCES := $(wildcard tests/*/*.c tests/fuzz/rig/*.[ch] bench/load/*.[ch])

# The drawing library of the web page, from npm.
PAGE_LIBRARY := nodeagent/page/static/vendor/cytoscape.mjs

# Where `make install` puts the daemons, and where its units look for them.
PREFIX ?= /opt/nodeagent

# Where each shell looks for what completes a command, on Debian.
BASH_COMPLETION := /usr/share/bash-completion/completions/nodeagent
ZSH_COMPLETION := /usr/share/zsh/vendor-completions/_nodeagent
FISH_COMPLETION := /usr/share/fish/vendor_completions.d/nodeagent.fish

# PYTEST_ARGS: more arguments for pytest, such as `-k NAME` or `-x`.
PYTEST := $(BIN)/pytest
PYTEST_ARGS ?=
# BENCH_ARGS: more arguments for bench/run.py, such as `--rounds 9` or `--scenario latency`.
BENCH_ARGS ?=
SOAK_MINUTES ?= 20

.PHONY: help
help: ## Show this list
	@echo 'Usage: make TARGET'
	@echo
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-17s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# --- setting up --------------------------------------------------------------------------------

.PHONY: setup
setup: $(VENV)/.built $(PAGE_LIBRARY) ## Install what is missing and build into .venv

.PHONY: system-packages
system-packages:
	@missing=$$(for package in $(SYSTEM_PACKAGES); do \
		[[ "$$(dpkg-query -W -f '$${db:Status-Status}' "$$package" 2>/dev/null)" == installed ]] \
			|| echo "$$package"; done | xargs); \
	if [[ -z "$$missing" ]]; then exit 0; fi; \
	if [[ "$$(id -u)" != 0 ]] || ! command -v apt-get >/dev/null; then \
		echo "make setup: these packages are missing, and installing them needs root on Debian:" >&2; \
		echo "  apt-get install --no-install-recommends $$missing" >&2; exit 1; fi; \
	export DEBIAN_FRONTEND=noninteractive; \
	apt-get update -q; \
	apt-get install -q -y --no-install-recommends $$missing

$(VENV)/.installed: requirements-dev.lock | system-packages
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed")'
	[[ -x $(BIN)/python ]] || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --require-hashes -r requirements-dev.lock
	touch $@

# pip builds everything once; afterwards only what changed is compiled.
$(VENV)/.editable: $(VENV)/.installed pyproject.toml
	PYTHONWARNINGS='ignore:Editable installation.' \
		$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --editable .
	touch $@

$(VENV)/.built: $(VENV)/.editable setup.py $(C_SOURCES) $(BPF_SOURCES)
	$(BIN)/python setup.py --quiet build_bpf build_ext --inplace
	touch $@

# Tried again each time for as long as it cannot be had: the rest works without it.
$(PAGE_LIBRARY): web/package-lock.json | $(VENV)/.editable
	$(BIN)/python setup.py --quiet build_page

.PHONY: build
build: setup ## Compile the C and BPF parts that changed (as every other target does)

.PHONY: dist
dist: setup ## Make the wheel for nodes: compiled parts included, no compiler needed there
	rm -rf build/wheel dist
	$(BIN)/python -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir dist .

.PHONY: man
man: setup ## Write the manual pages of every command into build/man
	rm -rf build/man
	$(BIN)/python man/generate.py build/man

.PHONY: install
install: dist man ## Install both daemons and their units on this machine (root; starts nothing)
	$(PYTHON) -m venv $(PREFIX)
	$(PREFIX)/bin/python -m pip install --quiet --require-hashes -r requirements.lock
	$(PREFIX)/bin/python -m pip install --quiet --no-deps --force-reinstall dist/*.whl
	for unit in nodeagent ztunnel; do \
		sed 's#/opt/nodeagent/#$(PREFIX)/#' systemd/$$unit.service \
			| install -D -m 0644 /dev/stdin /etc/systemd/system/$$unit.service; \
	done
	install -D -m 0644 systemd/nodeagent.tmpfiles.conf /usr/lib/tmpfiles.d/nodeagent.conf
	install -D -m 0644 -t /usr/share/doc/nodeagent docs/*.md
	install -D -m 0644 -t /usr/local/share/man/man8 build/man/*.8
	install -d /usr/local/bin $(dir $(BASH_COMPLETION) $(ZSH_COMPLETION) $(FISH_COMPLETION))
	ln -sf $(PREFIX)/bin/nodeagent /usr/local/bin/nodeagent
	$(PREFIX)/bin/nodeagent completion bash >$(BASH_COMPLETION)
	$(PREFIX)/bin/nodeagent completion zsh >$(ZSH_COMPLETION)
	$(PREFIX)/bin/nodeagent completion fish >$(FISH_COMPLETION)
	[[ -e /etc/nodeagent/nodeagent.yaml ]] \
		|| install -D -m 0644 systemd/nodeagent.yaml /etc/nodeagent/nodeagent.yaml
	systemd-tmpfiles --create nodeagent.conf
	[[ ! -d /run/systemd/system ]] || systemctl daemon-reload

.PHONY: lock
lock: | system-packages ## Choose dependency versions anew and write the lock files
	[[ -x $(BIN)/pip-compile ]] || { $(PYTHON) -m venv $(VENV); $(BIN)/pip install --quiet pip-tools; }
	$(call pip_compile,requirements.lock,)
	$(call pip_compile,requirements-dev.lock,--extra dev --constraint requirements.lock)
	# pip-compile forgets the condition of a requirement of an extra.
	sed -i 's/^atheris==[^ ]*/& ; platform_machine == "x86_64"/' requirements-dev.lock

define pip_compile
CUSTOM_COMPILE_COMMAND='make lock' $(BIN)/pip-compile --quiet --upgrade --generate-hashes \
	--no-emit-index-url --no-emit-trusted-host --no-emit-find-links --strip-extras --allow-unsafe \
	$(2) --output-file $(1) pyproject.toml
endef

# --- checking ----------------------------------------------------------------------------------

.PHONY: lint
lint: setup ## Check style, types, import layers and C formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	web/node_modules/.bin/tsc --project web
	clang-format --dry-run -Werror $(C_SOURCES) $(BPF_SOURCES) $(TRACE_SOURCES) $(TEST_C_SOURCES)

.PHONY: format
format: setup ## Rewrite Python and C in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	clang-format -i $(C_SOURCES) $(BPF_SOURCES) $(TRACE_SOURCES) $(TEST_C_SOURCES)

.PHONY: schemas
schemas: setup ## Write the JSON Schemas and the CRDs of the resources anew from their types
	$(BIN)/python schemas/generate.py

# Programs of Debian's that tests speak to, from packages that would start a service: unpacked here,
# never installed.
PEERS := prometheus
# Its own user for downloads may not write here.
DOWNLOAD := apt-get download -q -o APT::Sandbox::User="$$(id -un)"
.PHONY: peers
peers: $(PEERS:%=build/peers/%/.unpacked) build/peers/kernel-headers/.unpacked ## Unpack the programs that tests speak to

# What bcc compiles against, whatever kernel runs here: two packages, whose names change with each
# update, as one tree.
build/peers/kernel-headers/.unpacked: | system-packages
	rm -rf $(@D)
	mkdir -p $(@D)/unpacked
	depends() { apt-cache depends "$$1" | sed -n 's/^ *Depends: \(linux-headers-.*\)/\1/p'; }; \
	found="$$(depends linux-headers-$$(dpkg --print-architecture))"; \
	if [[ -z "$$found" ]]; then apt-get update -q; \
		found="$$(depends linux-headers-$$(dpkg --print-architecture))"; fi; \
	packages="$$found $$(depends $$found)"; \
	cd $(@D) && { $(DOWNLOAD) $$packages || { apt-get update -q && $(DOWNLOAD) $$packages; }; }
	for package in $(@D)/*.deb; do dpkg -x $$package $(@D)/unpacked; done
	cp -r --no-preserve=mode $(@D)/unpacked/usr/src/*-common/. $(@D)/
	cp -r --no-preserve=mode $(@D)/unpacked/usr/src/*-$$(dpkg --print-architecture)/. $(@D)/
	rm -r $(@D)/unpacked $(@D)/*.deb
	touch $@

build/peers/%/.unpacked: | system-packages
	rm -rf $(@D)
	mkdir -p $(@D)
	cd $(@D) && { $(DOWNLOAD) $* || { apt-get update -q && $(DOWNLOAD) $*; }; }
	dpkg -x $(@D)/$*_*.deb $(@D)
	rm $(@D)/$*_*.deb
	touch $@

.PHONY: snapshots
snapshots: setup ## Write what every command says anew, to be looked at (tests/snapshots)
	rm -rf tests/snapshots/cli/said
	UPDATE_SNAPSHOTS=1 $(PYTEST) -q tests/unit/test_cli_snapshots.py
	git --no-pager diff --stat tests/snapshots || true

.PHONY: test
test: setup peers lint ## Run everything: lint, unit, namespace and interop tests (root)
	$(PYTEST) $(PYTEST_ARGS)

.PHONY: test-unit
test-unit: setup peers ## Run the tests that need no privileges
	$(PYTEST) -m 'not netns and not interop' $(PYTEST_ARGS)

.PHONY: test-netns
test-netns: setup peers ## Run the tests in network namespaces (root)
	$(PYTEST) -m netns $(PYTEST_ARGS)

# An instrumented copy of both packages stands before the installed ones on the path, and the tests
# and every daemon that they start run on an interpreter with the sanitizer linked in: the runtime
# must come first in each process, and other programs have their own faults. Reports go to files, as
# most of these processes are daemons, and any file is a failure. Leaks are not reported: CPython
# itself keeps memory until exit.
SANITIZER_OPTIONS = log_path=$(CURDIR)/build/$(1)/report:abort_on_error=1

define sanitized_test
rm -rf build/$(1)
NODEAGENT_SANITIZE=$(2) $(BIN)/python setup.py --quiet build --build-lib build/$(1) \
	--build-temp build/$(1)-objects
mkdir -p build/$(1)/venv/bin
cp $(VENV)/pyvenv.cfg build/$(1)/venv/
ln -s $(CURDIR)/$(VENV)/lib build/$(1)/venv/lib
gcc -g -Wall -Wextra -Werror -fsanitize=$(2) $$($(PYTHON)-config --includes) \
	-o build/$(1)/venv/bin/python tests/support/interpreter.c \
	$$($(PYTHON)-config --ldflags --embed)
failed=0; \
PYTHONPATH=$(CURDIR)/build/$(1) PYTHONSAFEPATH=1 PYTHONMALLOC=malloc NODEAGENT_TEST_PATIENCE=4 \
ASAN_OPTIONS=$(SANITIZER_OPTIONS):detect_leaks=0:detect_stack_use_after_return=1 \
UBSAN_OPTIONS=$(SANITIZER_OPTIONS):print_stacktrace=1 \
TSAN_OPTIONS=$(SANITIZER_OPTIONS):second_deadlock_stack=1:die_after_fork=0:suppressions=$(CURDIR)/tests/support/tsan.supp \
	$(3) build/$(1)/venv/bin/python -m pytest -m netns $(PYTEST_ARGS) || failed=$$?; \
shopt -s nullglob; reports=(build/$(1)/report.*); \
if (( $${#reports[@]} )); then cat "$${reports[@]}"; exit 1; fi; \
exit $$failed
endef

.PHONY: sanitize
sanitize: setup peers ## Run the namespace tests with AddressSanitizer and UBSan (root)
	$(call sanitized_test,asan,address$(comma)undefined)

# ThreadSanitizer's shadow memory and a wide address space randomisation exclude each other.
.PHONY: sanitize-threads
sanitize-threads: setup peers ## Run the namespace tests with ThreadSanitizer (root)
	$(call sanitized_test,tsan,thread,setarch -R)

comma := ,

# Each fuzzer states its invariant at its head. Those in C drive the product's core in a world of
# their own (tests/fuzz/rig), which the linker puts in the place of sockets, threads and time; those
# in Python drive the parsers of what other programs send. What they find is kept in build/fuzz.
FUZZ_SECONDS ?= 60
C_FUZZERS := $(patsubst tests/fuzz/%.c,%,$(wildcard tests/fuzz/*.c))
PYTHON_FUZZERS := $(patsubst tests/fuzz/%.py,%,$(wildcard tests/fuzz/*.py))
FUZZERS ?= $(C_FUZZERS) $(PYTHON_FUZZERS)
RIG_SOURCES := $(wildcard tests/fuzz/rig/*.c) \
	$(filter-out %/tls.c %/sock.c $(wildcard ztunnel/_core/module*.c),$(wildcard ztunnel/_core/*.c))
RIG_OBJECTS := $(RIG_SOURCES:%.c=build/fuzz/objects/%.o)
RIG_WRAPPED := malloc calloc realloc free strndup pthread_create pthread_join pthread_setname_np \
	clock_gettime getrandom epoll_wait accept4 getsockname nghttp2_submit_shutdown_notice \
	nghttp2_submit_goaway nghttp2_submit_ping nghttp2_session_set_local_window_size
FUZZ_CC := clang -g -O1 -std=gnu17 -Wall -Wextra -Werror -Iztunnel/_core \
	-fsanitize=address,undefined -fno-sanitize-recover=all

$(RIG_OBJECTS): build/fuzz/objects/%.o: %.c $(wildcard ztunnel/_core/*.h tests/fuzz/rig/*.h) \
		| system-packages
	mkdir -p $(@D)
	$(FUZZ_CC) -fsanitize=fuzzer-no-link -c -o $@ $<

# nghttp2 is linked in, so that its allocations fail too.
build/fuzz/%: tests/fuzz/%.c $(RIG_OBJECTS)
	$(FUZZ_CC) -fsanitize=fuzzer -o $@ $< $(RIG_OBJECTS) $(RIG_WRAPPED:%=-Wl,--wrap=%) \
		-Wl,-Bstatic -lnghttp2 -Wl,-Bdynamic -lpthread

.PHONY: fuzz
fuzz: setup $(C_FUZZERS:%=build/fuzz/%) ## Fuzz everything, FUZZ_SECONDS (60) each; FUZZERS names some
	for fuzzer in $(FUZZERS); do \
		mkdir -p build/fuzz/found/$$fuzzer; \
		program="build/fuzz/$$fuzzer"; \
		[[ -e tests/fuzz/$$fuzzer.c ]] || program="$(BIN)/python tests/fuzz/$$fuzzer.py"; \
		PYTHONPATH=tests $$program -max_total_time=$(FUZZ_SECONDS) -timeout=10 -max_len=8192 \
			-print_final_stats=1 -artifact_prefix=build/fuzz/ build/fuzz/found/$$fuzzer \
			tests/fuzz/corpus/$$fuzzer; \
	done

.PHONY: policy-cases
policy-cases: setup ## A million random decisions on policies, against a second opinion (20 minutes)
	POLICY_CASES=1000000 $(PYTEST) --timeout=0 -o faulthandler_timeout=0 tests/unit/test_ztunnel_policy_properties.py

# What takes too long for every change, one after the other: CI calls it once a day.
NIGHTLY := sanitize sanitize-threads fuzz soak policy-cases
.PHONY: nightly
nightly: ## Run what takes hours: sanitizers, ten minutes of each fuzzer, soak (root)
	for target in $(NIGHTLY); do $(MAKE) "$$target" FUZZ_SECONDS=600; done

# --- showing -----------------------------------------------------------------------------------

.PHONY: demo
demo: setup ## Two nodes, real traffic, and proof that the wire is encrypted (root)
	$(BIN)/nodeagent lab demo

# The programs that make the load; they are no part of the product.
BENCH_TOOLS := $(addprefix build/bench/,serve load many relay)
$(BENCH_TOOLS): build/bench/%: bench/load/%.c bench/load/common.c bench/load/common.h | system-packages
	mkdir -p $(@D)
	gcc -D_GNU_SOURCE -std=gnu17 -O2 -g -Wall -Wextra -Werror -pthread -o $@ $(filter %.c,$^)

.PHONY: bench
bench: setup $(BENCH_TOOLS) ## Measure against no mesh and against Envoy (root, 22 minutes)
	$(BIN)/python bench/run.py $(BENCH_ARGS)

.PHONY: bench-quick
bench-quick: setup $(BENCH_TOOLS) ## The same in two short rounds (root, under ten minutes)
	$(BIN)/python bench/run.py --quick $(BENCH_ARGS)

.PHONY: soak
soak: setup ## Mixed load and faults for SOAK_MINUTES (20): is anything left behind? (root)
	PYTHONPATH=tests $(BIN)/python -m soak.run --minutes $(SOAK_MINUTES)

.PHONY: clean
clean: ## Remove everything that was built or installed here
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
	rm -rf nodeagent/capture/bpf nodeagent/page/static/vendor web/node_modules
	find nodeagent ztunnel tests bench -name __pycache__ -prune -exec rm -rf {} +
	find nodeagent ztunnel -name '*.so' -delete
