package control

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
)

// A reader that pauses delays no writer, and is told what it missed.
func TestLines(t *testing.T) {
	r, w := io.Pipe()
	l := NewLines(w)
	defer close(l.queue) // ends its goroutine
	const missed = 5
	_, _ = io.WriteString(l, "0\n")
	for len(l.queue) > 0 { // the first is being written
		runtime.Gosched()
	}
	for i := 1; i <= mostLines+missed; i++ {
		_, _ = fmt.Fprintln(l, i)
	}
	in := bufio.NewReader(r)
	next := func() string {
		text, err := in.ReadString('\n')
		if err != nil {
			t.Fatal(err)
		}
		return text
	}
	for i := range mostLines + 1 {
		if text := next(); text != fmt.Sprintln(i) {
			t.Fatalf("line %d is %q", i, text)
		}
		if i == 0 {
			if text := next(); text != fmt.Sprintf("%d log lines are missing here\n", missed) {
				t.Errorf("got %q", text)
			}
		}
	}
	go func() { _, _ = io.WriteString(l, "end\n"); _ = l.Sync(); _ = w.Close() }()
	if text := next(); text != "end\n" {
		t.Errorf("got %q", text)
	}
	if _, err := in.ReadString('\n'); err != io.EOF {
		t.Errorf("Sync has not waited: %v", err)
	}
}

// failing is a file on a disk that is full for some writes.
type failing struct {
	bytes.Buffer
	left int // writes that fail
}

func (f *failing) Write(b []byte) (int, error) {
	if f.left > 0 {
		f.left--
		return 0, syscall.ENOSPC
	}
	return f.Buffer.Write(b)
}

// What could not be written is told, in the log's own form, as soon as something can.
func TestLinesNotWritten(t *testing.T) {
	w := &failing{left: 3} // the second time, the line that says so is one of them
	l := NewLines(w)
	defer close(l.queue)
	log, err := NewLogger(l, "info", "json", false)
	if err != nil {
		t.Fatal(err)
	}
	for _, msg := range []string{"a", "b", "c", "d"} {
		log.Info(msg)
	}
	_ = l.Sync()
	var got []string
	for line := range strings.Lines(w.String()) {
		var e struct {
			Msg   string
			Lines int
		}
		if err := json.Unmarshal([]byte(line), &e); err != nil {
			t.Errorf("%v: %s", err, line)
		}
		got = append(got, fmt.Sprint(e.Msg, " ", e.Lines))
	}
	// a fails; its note fails, as b does; the next note can be written.
	if want := []string{"log lines are missing here 2", "c 0", "d 0"}; !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}
