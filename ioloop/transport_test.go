package ioloop

import (
	"bytes"
	"errors"
	"io"
	"net"
	"os"
	"testing"
	"time"
)

func TestTransportRest(t *testing.T) {
	for name, link := range links {
		t.Run(name, func(t *testing.T) {
			a, b := link(t)
			defer a.Close()
			tr := newTransport(b)
			want := pattern(5000, 1)
			var got []byte
			p := make([]byte, 1000)
			for _, keeps := range []bool{false, true} {
				idle, calls := make(chan struct{}, 1), 0
				sent := background(func() {
					<-idle
					if _, err := a.Write(want); err != nil {
						t.Error(err)
					}
				})
				n, err := tr.recv(p, func() bool {
					calls++
					idle <- struct{}{}
					if !keeps {
						clear(p)
						p = nil // released
					}
					return !keeps
				})
				if keeps {
					if err != nil || n == 0 {
						t.Fatal(n, err)
					}
				} else if n != 0 || err != errAgain {
					t.Fatal(n, err)
				}
				if calls != 1 {
					t.Fatalf("idle was called %d times", calls)
				}
				if p == nil {
					p = make([]byte, 1000)
				}
				got = append(got[:0], p[:n]...)
				for len(got) < len(want) {
					n, err := tr.recv(p, nil)
					must(t, err)
					got = append(got, p[:n]...)
				}
				if !bytes.Equal(got, want) {
					t.Fatal("other bytes")
				}
				await(t, sent, "the client")
			}
			must(t, a.Close())
			if n, err := tr.recv(p, nil); err != io.EOF || n != 0 {
				t.Fatal(n, err)
			}
			_ = tr.close() // TLS cannot say goodbye to who has left
		})
	}
}

// Closing and the deadline of the connection end a receive and a send that
// wait.
func TestTransportClose(t *testing.T) {
	for name, link := range links {
		t.Run(name, func(t *testing.T) {
			a, b := link(t)
			defer a.Close()
			smallBuffers(t, a, b)
			tr := newTransport(b)
			idle := make(chan struct{}, 2)
			note := func(keeps bool) func() bool {
				return func() bool { idle <- struct{}{}; return !keeps }
			}
			result := make(chan error, 3)
			receive := func(keeps bool) {
				_, err := tr.recv(make([]byte, 10), note(keeps))
				result <- err
			}
			for _, keeps := range []bool{false, true} {
				go receive(keeps)
				await(t, idle, "recv to wait")
				must(t, b.SetReadDeadline(time.Unix(1, 0)))
				if err := await(t, result, "the deadline"); !errors.Is(err, os.ErrDeadlineExceeded) {
					t.Fatal(err)
				}
				must(t, b.SetReadDeadline(time.Time{}))
			}
			go receive(false)
			await(t, idle, "recv to wait")
			full := make([]byte, 1<<20)
			for {
				if _, err := tr.trySend([][]byte{full}); err == errAgain {
					break
				} else {
					must(t, err)
				}
			}
			go func() {
				for {
					if _, err := tr.send([][]byte{full}); err != nil {
						result <- err
						return
					}
				}
			}()
			must(t, tr.close())
			for range 2 {
				if err := await(t, result, "a call to end"); !errors.Is(err, net.ErrClosed) && !errors.Is(err, io.ErrClosedPipe) {
					t.Fatal(err)
				}
			}
			if _, err := tr.trySend([][]byte{full}); err == nil {
				t.Fatal("sent after closing")
			}
		})
	}
}

// More pieces than one system call takes, some empty.
func TestTransportManyPieces(t *testing.T) {
	a, b := socketpair(t)
	defer a.Close()
	tr := newTransport(b)
	want := pattern(3*maxSegments*10, 2)
	var segs [][]byte
	for i := 0; i < len(want); i += 10 {
		segs = append(segs, want[i:i+10], nil)
	}
	got := make([]byte, len(want))
	done := background(func() {
		if _, err := io.ReadFull(a, got); err != nil {
			t.Error(err)
		}
	})
	for len(segs) > 0 {
		n, err := tr.send(segs)
		must(t, err)
		for len(segs) > 0 && n >= len(segs[0]) {
			n -= len(segs[0])
			segs = segs[1:]
		}
		if n > 0 {
			segs[0] = segs[0][n:]
		}
	}
	await(t, done, "the client")
	if !bytes.Equal(got, want) {
		t.Fatal("other bytes")
	}
	must(t, tr.close())
}

// endsWithBytes tells the end of the stream together with its last bytes, as
// crypto/tls does.
type endsWithBytes struct {
	net.Conn
	left []byte
}

func (e *endsWithBytes) Read(p []byte) (int, error) {
	n := copy(p, e.left)
	if e.left = e.left[n:]; len(e.left) == 0 {
		return n, io.EOF
	}
	return n, nil
}

func TestTransportEndWithBytes(t *testing.T) {
	for _, rests := range []bool{false, true} {
		for _, sent := range []string{"a", "abc"} {
			s := &stream{nc: &endsWithBytes{left: []byte(sent)}}
			p := make([]byte, 10)
			got := ""
			for {
				n, err := s.recv(p, func() bool { return rests })
				got += string(p[:n])
				if err == io.EOF {
					break
				}
				if err != errAgain {
					must(t, err)
				}
			}
			if got != sent {
				t.Fatalf("%q, want %q", got, sent)
			}
		}
	}
}
