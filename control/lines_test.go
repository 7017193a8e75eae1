package control

import (
	"bufio"
	"fmt"
	"io"
	"runtime"
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
			if text := next(); text != fmt.Sprintf("nbd-export: %d log lines are missing here: nobody read them in time\n", missed) {
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
