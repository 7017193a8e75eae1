package ioloop

import (
	"fmt"
	"io/fs"
	"testing"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"
	"golang.org/x/sys/unix"

	"github.com/nbd-export/nbd-export/backend"
	"github.com/nbd-export/nbd-export/state"
)

// The operator hears of storage that fails, not of what clients do wrong.
func TestStorageFaultsAreLogged(t *testing.T) {
	core, logs := observer.New(zapcore.InfoLevel)
	r := newRig(t, rigConfig{tmpfs: true, Config: Config{Log: zap.New(core)}})
	full := &fs.PathError{Op: "write", Path: "disk.img", Err: unix.ENOSPC}
	r.img.set(func(h *hooked) {
		h.preparing = func(int64, backend.Mode) error { return full }
		h.flushing = func() error { return unix.EIO }
		h.discarding = func(int64, int64) error { return unix.ENOTSUP }
	})
	c := r.connect(&testCodec{})
	for range 3 { // the second and third are like the first
		c.do(OpWrite, 0, 8192, 4096, make([]byte, 4096))
	}
	c.do(OpFlush, 0, 0, 0, nil)
	c.do(OpDiscard, 0, 0, 4096, nil) // the file system cannot
	got := logs.All()
	if len(got) != 2 {
		t.Fatalf("%d lines: %v", len(got), got)
	}
	for i, want := range []string{
		fmt.Sprintf("map[error:write disk.img: no space left on device image:%s length:4096 offset:8192 op:write]", r.path),
		fmt.Sprintf("map[error:input/output error image:%s length:0 offset:0 op:flush]", r.path),
	} {
		if text := fmt.Sprint(got[i].ContextMap()); text != want || got[i].Level != zapcore.WarnLevel {
			t.Errorf("line %d: %v %s, want %s", i, got[i].Level, text, want)
		}
	}
}

func TestStorageFault(t *testing.T) {
	write := &Request{Op: OpWrite}
	for _, c := range []struct {
		r    *Request
		err  error
		want bool
	}{
		{write, unix.EIO, true},
		{write, fmt.Errorf("a table is broken"), true},
		{&Request{Op: OpReject}, unix.EINVAL, false},
		{write, state.ErrInactive, false},
		{write, state.ErrLate, false},
		{write, state.ErrReadOnly, false},
		{write, state.ErrStopping, false},
		{&Request{Op: OpFlush}, state.ErrDropped, false},
		{write, &state.FailedError{State: state.FailedIO, Cause: unix.EIO}, false},
	} {
		if got := storageFault(c.r, c.err); got != c.want {
			t.Errorf("%v, %v: %v", c.r.Op, c.err, got)
		}
	}
}

// Each operation has its line, and one that goes on failing another after a
// while, which counts those between.
func TestFaultsAreCounted(t *testing.T) {
	core, logs := observer.New(zapcore.InfoLevel)
	var f faultLog
	begin := time.Unix(1, 0)
	for _, c := range []struct {
		op   Op
		at   time.Duration
		want int // lines so far
	}{
		{OpWrite, 0, 1}, {OpWrite, 1, 1}, {OpRead, 2, 2}, {OpWrite, faultPause - 1, 2}, {OpWrite, faultPause, 3}, {OpWrite, faultPause + 1, 3},
	} {
		f.note(zap.New(core), "disk.img", &Request{Op: c.op}, unix.EIO, begin.Add(c.at))
		if n := logs.Len(); n != c.want {
			t.Fatalf("%+v: %d lines", c, n)
		}
	}
	if n := logs.All()[2].ContextMap()["before"]; n != uint64(2) {
		t.Errorf("%v failures before, want 2", n)
	}
}
