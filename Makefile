# make demo    runs the main job: two exporters, one image, ownership handed over
# make test    everything a change has to pass; installs what it needs by apt
# make model   every interleaving of the handover, the large searches too
# make bench   figures beside qemu-nbd and nbdkit, for docs/BENCHMARKS.md

GO          ?= go
STATICCHECK := honnef.co/go/tools/cmd/staticcheck@v0.8.2
VERSION     := $(shell git describe --always --dirty 2>/dev/null)
BIN         := bin/nbd-export
# The same with the hooks by which the crash matrix stops it and makes it fail.
HOOKED      := bin/nbd-export-hooks
# The version is given by hand, so that a copy without .git builds as well.
BUILDFLAGS  := -trimpath -buildvcs=false $(if $(VERSION),-ldflags "-X main.version=$(VERSION)")

# The integration tests take the programs under test from here.
export NBD_EXPORT := $(CURDIR)/$(BIN)
export NBD_EXPORT_HOOKED := $(CURDIR)/$(HOOKED)
# How long each fuzz test runs, and how long a soak goes on.
FUZZTIME ?= 5s
SOAK     ?= 5m

.PHONY: all build hooked demo test peers lint cross unit race fuzz integration soak model bench bench-part bench-quick clean

all: build

# Go knows what has changed, make does not: build is always handed to it.
build:
	CGO_ENABLED=0 $(GO) build $(BUILDFLAGS) -o $(BIN) ./cmd/nbd-export

hooked:
	CGO_ENABLED=0 $(GO) build $(BUILDFLAGS) -tags testhooks -o $(HOOKED) ./cmd/nbd-export

demo: build
	$(BIN) demo

# One after the other, the quick ones first, also under make -j: the tests
# measure times, which a neighbour on the same processor would spoil.
test:
	@$(MAKE) --no-print-directory peers
	@$(MAKE) --no-print-directory lint
	@$(MAKE) --no-print-directory cross
	@$(MAKE) --no-print-directory unit
	@$(MAKE) --no-print-directory race
	@$(MAKE) --no-print-directory fuzz
	@$(MAKE) --no-print-directory integration

# The programs we are tested against.
peers:
	integration/scripts/install-peers

lint:
	@files=$$(gofmt -l $$(find . -name '*.go' -not -path '*/.cache/*')); \
	if [ -n "$$files" ]; then echo "gofmt would change:"; echo "$$files"; exit 1; fi
	$(GO) vet ./...
	$(GO) vet -tags testhooks ./backend ./cmd/nbd-export
	cd integration && $(GO) vet ./...
	$(GO) run $(STATICCHECK) ./...
	$(GO) run $(STATICCHECK) -tags testhooks ./backend ./cmd/nbd-export
	cd integration && $(GO) run $(STATICCHECK) ./...

# It compiles for the other architecture that we say we run on.
cross:
	CGO_ENABLED=0 GOOS=linux GOARCH=arm64 $(GO) build -o /dev/null ./cmd/nbd-export

unit:
	$(GO) test ./...
	NBD_EXPORT_ENGINE=portable $(GO) test ./ioloop

# The race detector is the one thing that needs a C compiler.
race:
	CGO_ENABLED=1 $(GO) test -race ./...

fuzz:
	GO="$(GO)" integration/scripts/fuzz $(FUZZTIME)

# One package at a time, for the same reason as above.
integration: build hooked
	cd integration && $(GO) test -count=1 -p 1 -timeout 20m ./...
	cd integration && NBD_EXPORT_ENGINE=portable $(GO) test -count=1 -timeout 5m -run '^(TestTwoExportersOnDisk|Test(Random|Pipelined)RequestsAgainstModel)$$/none' .

# The long versions of the tests that have one, and a long fuzz run.
soak: peers build hooked
	NBD_EXPORT_SOAK=$(SOAK) $(GO) test -count=1 -timeout 3h ./...
	cd integration && NBD_EXPORT_SOAK=$(SOAK) $(GO) test -count=1 -p 1 -timeout 3h ./...
	$(MAKE) fuzz FUZZTIME=$(SOAK)

# A minute, and 2 GB of memory; "go test" makes the small searches alone.
model:
	NBD_EXPORT_MODEL=full $(GO) test -count=1 -timeout 1h -v ./control/model

# Half an hour in which the machine should do nothing else. BENCHFLAGS=-list and
# the like are for bench/compare.
bench: peers build
	$(GO) build -o bin/compare ./bench/compare
	bin/compare $(BENCHFLAGS)

# The same in parts, for a machine that is not free for so long: cells whose ids
# match CELLS (bin/compare -list), beside what other parts have measured.
bench-part: peers build
	$(GO) build -o bin/compare ./bench/compare
	bin/compare -onto bin/bench/parts.json -cells '$(CELLS)' $(BENCHFLAGS)

# Under three minutes; writes below bin/ and decides nothing.
bench-quick: peers build
	$(GO) build -o bin/compare ./bench/compare
	bin/compare -quick $(BENCHFLAGS)

clean:
	rm -rf bin integration/.cache
