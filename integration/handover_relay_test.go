package integration

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// relayEnv makes the test binary a command that stands between "handover" and
// a control socket, as ssh would, and does something to one message:
//
//	SOCKET|TROUBLE|MESSAGE|MARKER|THEN
//
// Messages are counted from 1, in both directions together. Once MARKER exists
// a later run is a plain relay, or with THEN "dead" one that ends at once.
const relayEnv = "NBD_EXPORT_TEST_RELAY"

const (
	relayDelay  = "delay"  // the message is late
	relayHold   = "hold"   // the message waits until the test lets it go
	relayBefore = "before" // the command ends instead of passing it on
	relayAfter  = "after"  // the command ends once it has passed it on
	relayStall  = "stall"  // neither it nor what follows is passed on
)

func init() {
	if spec := os.Getenv(relayEnv); spec != "" {
		os.Exit(relayMain(strings.Split(spec, "|")))
	}
}

func relayMain(spec []string) int {
	socket, trouble, marker, then := spec[0], spec[1], spec[3], spec[4]
	at, err := strconv.Atoi(spec[2])
	if err != nil {
		return 9
	}
	f, err := os.OpenFile(marker, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil { // not the first
		if then == "dead" {
			fmt.Fprintln(os.Stderr, "the other host does not answer")
			return 7
		}
		at = 0
	} else {
		f.Close()
	}
	nc, err := net.Dial("unix", socket)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 8
	}
	var count atomic.Int64
	var one sync.Mutex // messages pass one by one
	pass := func(w io.Writer, line []byte) {
		one.Lock()
		defer one.Unlock()
		n := int(count.Add(1))
		if n == at && trouble == relayDelay {
			time.Sleep(80 * time.Millisecond)
		}
		if n == at && trouble == relayHold {
			if err := os.WriteFile(marker+".held", nil, 0o600); err != nil {
				os.Exit(9)
			}
			for !exists(marker + ".go") {
				time.Sleep(time.Millisecond)
			}
		}
		if n == at && trouble == relayBefore {
			os.Exit(6)
		}
		if n >= at && at > 0 && trouble == relayStall {
			select {}
		}
		_, _ = w.Write(line)
		if n == at && trouble == relayAfter {
			os.Exit(6)
		}
	}
	lines := func(r io.Reader, w io.Writer) {
		in := bufio.NewReader(r)
		for {
			line, err := in.ReadBytes('\n')
			if err != nil {
				return
			}
			pass(w, line)
		}
	}
	go func() {
		lines(os.Stdin, nc)
		_ = nc.(*net.UnixConn).CloseWrite()
	}()
	lines(nc, os.Stdout)
	return 0
}

func exists(path string) bool { _, err := os.Stat(path); return err == nil }

// relay is a CTL that reaches e through such a command.
func relay(t testing.TB, e *daemon, trouble string, message int, then string) string {
	t.Helper()
	ctl, _ := relayMarked(t, e, trouble, message, then)
	return ctl
}

func relayMarked(t testing.TB, e *daemon, trouble string, message int, then string) (ctl, marker string) {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	marker = filepath.Join(shortDir(t), "used")
	return fmt.Sprintf("exec:%s='%s|%s|%d|%s|%s' exec '%s'", relayEnv, e.control, trouble, message, marker, then, self), marker
}

// hold is a CTL that holds up a message to or from e, and the message.
func hold(t testing.TB, e *daemon, message int) (string, *held) {
	t.Helper()
	ctl, marker := relayMarked(t, e, relayHold, message, "well")
	return ctl, &held{t, marker}
}

type held struct {
	t      testing.TB
	marker string
}

// wait returns when the message is there, or the command that it is for has
// ended without.
func (h *held) wait(p *process) {
	h.t.Helper()
	waitFor(h.t, startTimeout, "the message comes", func() bool { return exists(h.marker+".held") || !p.alive() })
}

func (h *held) release() {
	h.t.Helper()
	if err := os.WriteFile(h.marker+".go", nil, 0o600); err != nil {
		h.t.Fatal(err)
	}
}
