# Every target installs what it needs (Debian 12 as root; Python 3.11 or later) and leaves nothing running.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

# The lab's Keystone, Barbican and Glance live in an environment of their own.
CLOUD_LAB := tests/lab/openstack
CLOUD     := build/openstack
OPENSTACK := $(CLOUD)/.installed

# What the packages are for: a hypervisor without KVM; building libvirt-python; the tools tests and users compare with.
PACKAGES := libvirt-daemon-system libvirt-clients qemu-system-x86 qemu-utils seabios \
            libvirt-dev pkg-config gcc libc6-dev binutils python3-venv python3-dev \
            util-linux mount e2fsprogs xfsprogs zstd openssl strace curl
BENCH_PACKAGES := age gnupg restic borgbackup coreutils time

.PHONY: demo demo-openstack demo-rules demo-chain test check lint fmt bench crash clean packages bench-packages

demo: $(STAMP)
	$(BIN)/python -m tests.demo

demo-openstack: $(STAMP) $(OPENSTACK)
	$(BIN)/python -m tests.demo_openstack

demo-rules: $(STAMP)
	$(BIN)/python -m tests.demo_rules

demo-chain: $(STAMP) $(OPENSTACK)
	$(BIN)/python -m tests.demo_chain

# Most tests wait for something: a file of them in each of so many processes (each has a libvirtd and a cloud of its own).
# The seed is made here, once, and not within the time that the first test has that wants a cloud.
TEST_PROCESSES ?= 4
test: $(STAMP) $(OPENSTACK)
	@$(BIN)/python -m tests.lab.openstack.seed
	AUTOBACKUP_REQUIRE_OPENSTACK=1 $(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

# The heavy variants of the crash and storm tests; CI runs the bounded ones within `test`.
crash: $(STAMP) $(OPENSTACK)
	AUTOBACKUP_LONG=1 $(BIN)/python -m pytest tests/crash tests/e2e/test_chain.py --timeout 3600 $(PYTEST_ARGS)

check: $(STAMP)
	$(BIN)/ruff format --check agent tests docs
	$(BIN)/ruff check agent tests docs
	$(BIN)/mypy
	$(BIN)/lint-imports

lint: check

fmt: $(STAMP)
	$(BIN)/ruff format agent tests docs
	$(BIN)/ruff check --fix agent tests docs

bench: $(STAMP) $(OPENSTACK) bench-packages
	$(BIN)/python -m tests.bench $(BENCH_ARGS)

clean:
	rm -rf build $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache agent/*.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

packages:
	@$(call apt_install,$(PACKAGES))

bench-packages:
	@$(call apt_install,$(BENCH_PACKAGES))

# The environment is made again when the project's dependencies change.
$(STAMP): pyproject.toml .ci/constraints.txt | packages
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or later is needed; name it with PYTHON=") if sys.version_info < (3, 11) else 0'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c .ci/constraints.txt --editable '.[dev]'
	@touch $@

$(OPENSTACK): $(CLOUD_LAB)/requirements.txt $(CLOUD_LAB)/constraints.txt | packages
	rm -rf $(CLOUD)/venv $@
	@mkdir -p $(CLOUD)
	$(PYTHON) -m venv $(CLOUD)/venv
	$(CLOUD)/venv/bin/python -m pip install --quiet --disable-pip-version-check \
	  -r $(CLOUD_LAB)/requirements.txt -c $(CLOUD_LAB)/constraints.txt
	@touch $@

# apt is asked only for what is missing, so that an installed machine needs no network.
apt_install = missing=; for package in $(1); do \
	  dpkg-query -W -f '$${Status}' $$package 2>/dev/null | grep -q 'ok installed' || missing="$$missing $$package"; \
	done; \
	if [ -n "$$missing" ]; then \
	  echo "installing:$$missing"; \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends $$missing >/dev/null; \
	fi
