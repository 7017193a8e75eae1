package main

import (
	"bufio"
	"io"
	"net"
	"path/filepath"
	"strings"
	"testing"
)

// fakeMonitor answers each command with the next of its answers, and hangs up when it
// has none. It returns what it was told.
func fakeMonitor(t *testing.T, answers ...string) (path string, told func() string) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	var said strings.Builder
	done := make(chan struct{})
	go func() {
		defer close(done)
		nc, err := l.Accept()
		if err != nil {
			return
		}
		defer nc.Close()
		in := bufio.NewReader(nc)
		_, _ = io.WriteString(nc, `{"QMP": {"version": {}}}`+"\r\n")
		for _, answer := range append([]string{`{"return": {}}`}, answers...) {
			line, err := in.ReadString('\n')
			if err != nil {
				return
			}
			said.WriteString(line)
			_, _ = io.WriteString(nc, answer+"\r\n")
		}
	}()
	return path, func() string { <-done; return said.String() }
}

// TestOrders gives orders by a program of their own, as handovers are measured.
func TestOrders(t *testing.T) {
	const event = `{"timestamp": {}, "event": "X", "data": {"return": 1}}` + "\r\n"
	a, toldA := fakeMonitor(t, event+`{"return": {}}`, event+event+`{"return": {}}`)
	b, toldB := fakeMonitor(t, `{"return": {}}`, `{"error": {"class": "GenericError", "desc": "it is owned"}}`)
	o, err := startOrders(t.Context(), self(t), orderConfig{[2]string{a, b}, "disk"})
	if err != nil {
		t.Fatal(err)
	}
	defer o.stop()
	if took, err := o.give(oneOrder{0, false}, oneOrder{1, true}); err != nil || took <= 0 {
		t.Fatal(took, err)
	}
	if _, err := o.give(oneOrder{0, true}); err != nil {
		t.Fatal(err)
	}
	if _, err := o.give(oneOrder{1, false}, oneOrder{0, true}); err == nil || err.Error() != b+": it is owned" {
		t.Error(err)
	}
	if _, err := o.give(oneOrder{1, false}); err == nil || !strings.Contains(err.Error(), b+": ") {
		t.Errorf("of a monitor that hung up: %v", err)
	}
	const hello = `{"execute": "qmp_capabilities"}` + "\n"
	const order = `{"execute": "blockdev-set-active", "arguments": {"node-name": "disk", "active": `
	if got := toldA(); got != hello+order+"false}}\n"+order+"true}}\n" {
		t.Errorf("told %s", got)
	}
	if got := toldB(); got != hello+order+"true}}\n"+order+"false}}\n" {
		t.Errorf("told %s", got)
	}
}

// What is not there to be given orders leaves nothing to be stopped.
func TestOrdersNobody(t *testing.T) {
	none := filepath.Join(t.TempDir(), "none")
	x := &exporters{program: programLimit}
	for side := range x.procs {
		x.procs[side] = &process{}
	}
	var err error
	x.orderer, err = startOrders(t.Context(), self(t), orderConfig{[2]string{none, none}, "disk"})
	if err == nil || !strings.Contains(err.Error(), "none: no such file or directory") {
		t.Error(err)
	}
	x.stop()
}
