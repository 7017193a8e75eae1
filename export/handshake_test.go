package export

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/nbd-export/nbd-export/export/wire"
	"github.com/nbd-export/nbd-export/ioloop"
)

func TestH1Greeting(t *testing.T) {
	x, _ := testExports(t)
	p, _ := talk(t, x)
	if got, want := p.read(18), []byte("NBDMAGICIHAVEOPT\x00\x03"); !bytes.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestH2ClientFlags(t *testing.T) {
	x, _ := testExports(t)
	for _, flags := range []uint32{1 << 2, 1 << 31, fixedNoZeroes | 1<<5, 0x47455420 /* "GET " */} {
		p, done := talk(t, x)
		p.greet(flags)
		p.closed()
		if o := <-done; o.err == nil || !strings.Contains(o.err.Error(), "client flags") {
			t.Errorf("%#x: %v", flags, o.err)
		}
	}
}

// TestH3NotFixed: a client that does not claim fixed newstyle is answered all
// the same, since some only forget the flag.
func TestH3NotFixed(t *testing.T) {
	x, _ := testExports(t)
	for opt, want := range map[uint32]uint32{wire.OptList: wire.RepServer, wire.OptStartTLS: wire.RepErrUnsup, 99: wire.RepErrUnsup} {
		p, _ := talk(t, x)
		p.greet(0)
		p.send(opt, nil)
		b := p.read(wire.OptionReplySize)
		if echo, rep := binary.BigEndian.Uint32(b[8:]), binary.BigEndian.Uint32(b[12:]); echo != opt || rep != want {
			t.Errorf("option %d: reply %#x to option %d, want %#x", opt, rep, echo, want)
		}
	}
	p, done := talk(t, x)
	p.greet(0)
	p.send(wire.OptExportName, nil)
	p.read(8 + 2 + 124)
	if o := <-done; o.err != nil || o.export == nil || o.terms.structured {
		t.Errorf("EXPORT_NAME: %+v", o)
	}
}

func TestH4Zeroes(t *testing.T) {
	x, _ := testExports(t)
	for flags, pad := range map[uint32]int{0: 124, wire.FlagClientFixedNewstyle: 124, fixedNoZeroes: 0, wire.FlagClientNoZeroes: 0} {
		p, done := talk(t, x)
		p.greet(flags)
		p.send(wire.OptExportName, []byte("ro"))
		b := p.read(10 + pad)
		if size := binary.BigEndian.Uint64(b); size != 512 {
			t.Errorf("size %d", size)
		}
		if f := binary.BigEndian.Uint16(b[8:]); f&(wire.TransHasFlags|wire.TransReadOnly) != wire.TransHasFlags|wire.TransReadOnly {
			t.Errorf("flags %#x", f)
		}
		if !bytes.Equal(b[10:], make([]byte, pad)) {
			t.Errorf("padding %x", b[10:])
		}
		o := <-done // with the handshake over, nothing more was written
		if o.err != nil || o.export.Name != "ro" {
			t.Errorf("%+v", o)
		}
	}
	p, done := talk(t, x)
	p.greet(wire.FlagClientFixedNewstyle) // never after GO
	p.do(wire.OptGo, goData(""))
	if o := <-done; o.err != nil || o.export == nil {
		t.Errorf("GO: %+v", o)
	}
}

// Unknown options, H6, and malformed ones, H7, H9: each gets an error, exactly
// its data is consumed, and haggling goes on.
func TestH6H7H9BadOptions(t *testing.T) {
	x, _ := testExports(t)
	name := func(n uint32, rest string) []byte { return append(be32(n), rest...) }
	p, _ := greeted(t, x)
	p.final(wire.OptStructuredReply, nil, wire.RepAck)
	for _, tt := range []struct {
		row  string
		opt  uint32
		data []byte
		want uint32
	}{
		{"H6 unknown", 77, nil, wire.RepErrUnsup},
		{"H6 unknown with data", 0xffffffff, make([]byte, 5000), wire.RepErrUnsup},
		{"H6 unknown, long", 78, make([]byte, 1<<20), wire.RepErrUnsup},
		{"H6 PEEK_EXPORT", 4, nil, wire.RepErrUnsup},
		{"O18 EXTENDED_HEADERS", wire.OptExtendedHeaders, nil, wire.RepErrUnsup},
		{"O3 LIST with data", wire.OptList, []byte("x"), wire.RepErrInvalid},
		{"O3 LIST with much data", wire.OptList, make([]byte, maxOptionData+1), wire.RepErrInvalid},
		{"O4 STARTTLS", wire.OptStartTLS, nil, wire.RepErrUnsup},
		{"O4 STARTTLS with data", wire.OptStartTLS, []byte("x"), wire.RepErrInvalid},
		{"O13 STRUCTURED_REPLY with data", wire.OptStructuredReply, []byte("x"), wire.RepErrInvalid},
		{"O6 GO without data", wire.OptGo, nil, wire.RepErrInvalid},
		{"O6 GO short", wire.OptGo, make([]byte, 5), wire.RepErrInvalid},
		{"O6 INFO name too long", wire.OptInfo, name(3, "ro\x00\x00"), wire.RepErrInvalid},
		{"O6 INFO name overflow", wire.OptInfo, name(0xffffffff, "ro\x00\x00"), wire.RepErrInvalid},
		{"O6 INFO trailing byte", wire.OptInfo, append(goData(""), 0), wire.RepErrInvalid},
		{"O6 INFO request missing", wire.OptInfo, name(0, "\x00\x02\x00\x00"), wire.RepErrInvalid},
		{"H12 INFO too long", wire.OptInfo, make([]byte, maxOptionData+1), wire.RepErrTooBig},
		{"H8 NUL", wire.OptGo, goData("a\x00b"), wire.RepErrInvalid},
		{"H8 UTF-8", wire.OptGo, goData("\xff"), wire.RepErrInvalid},
		{"H8 4097 bytes", wire.OptGo, goData(strings.Repeat("x", 4097)), wire.RepErrInvalid},
		{"H8 4096 bytes", wire.OptGo, goData(strings.Repeat("x", 4096)), wire.RepErrUnknown},
		{"O8 unknown export INFO", wire.OptInfo, goData("none", wire.InfoName), wire.RepErrUnknown},
		{"O8 unknown export GO", wire.OptGo, goData("none", wire.InfoName), wire.RepErrUnknown},
		{"O16 META empty", wire.OptSetMetaContext, nil, wire.RepErrInvalid},
		{"O16 META short", wire.OptListMetaContext, make([]byte, 7), wire.RepErrInvalid},
		{"O16 META name too long", wire.OptListMetaContext, name(9, "ro\x00\x00\x00\x00"), wire.RepErrInvalid},
		{"O16 META query too long", wire.OptListMetaContext, append(be32(0, 1, 6), "base:"...), wire.RepErrInvalid},
		{"O16 META query missing", wire.OptListMetaContext, be32(0, 2, 0), wire.RepErrInvalid},
		{"O16 META queries overflow", wire.OptListMetaContext, be32(0, 0xffffffff), wire.RepErrInvalid},
		{"O16 META trailing", wire.OptListMetaContext, append(metaData("", "base:"), 0), wire.RepErrInvalid},
		{"O16 META unknown export", wire.OptSetMetaContext, metaData("none", "base:allocation"), wire.RepErrUnknown},
		{"O16 META too long", wire.OptSetMetaContext, make([]byte, maxOptionData+1), wire.RepErrTooBig},
		{"H8 META name", wire.OptSetMetaContext, metaData("\xff"), wire.RepErrInvalid},
		{"H8 META query", wire.OptSetMetaContext, metaData("", "x:\x00"), wire.RepErrInvalid},
	} {
		t.Run(tt.row, func(t *testing.T) {
			p.t = t
			text := p.final(tt.opt, tt.data, tt.want)
			if err := checkString(text); err != nil {
				t.Errorf("H13 text %q: %v", text, err)
			}
			p.inSync()
		})
	}
}

func TestH7BadMagic(t *testing.T) {
	x, _ := testExports(t)
	p, done := greeted(t, x)
	p.write(make([]byte, wire.OptionSize))
	p.closed()
	if o := <-done; o.err == nil || !strings.Contains(o.err.Error(), "magic") {
		t.Error(o.err)
	}
}

// H9, H12: what a client is disconnected for.
func TestH12Limits(t *testing.T) {
	x, _ := testExports(t)
	t.Run("option of 32 MiB is discarded", func(t *testing.T) {
		p, _ := greeted(t, x)
		p.write(optionHeader(wire.OptInfo, maxOptionDiscard))
		part := make([]byte, 1<<20)
		for range maxOptionDiscard / len(part) {
			p.write(part)
		}
		if r := p.replies(wire.OptInfo); r[0].typ != wire.RepErrTooBig {
			t.Errorf("%x", r)
		}
		p.inSync()
	})
	t.Run("option over 32 MiB", func(t *testing.T) {
		p, done := greeted(t, x)
		p.write(optionHeader(wire.OptInfo, maxOptionDiscard+1))
		p.closed()
		if o := <-done; o.err == nil {
			t.Error("accepted")
		}
	})
	t.Run("number of options", func(t *testing.T) {
		p, done := greeted(t, x)
		for range maxOptions {
			p.final(99, nil, wire.RepErrUnsup)
		}
		p.closed()
		if o := <-done; o.err == nil || !strings.Contains(o.err.Error(), "options") {
			t.Error(o.err)
		}
	})
	t.Run("time", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			client, server := net.Pipe()
			s := &Server{Exports: x, Mover: &inMemory{}}
			s.init()
			start := time.Now()
			s.admit(server)
			p := &peer{t, client}
			p.greet(fixedNoZeroes)
			for range 3 { // progress does not buy time
				time.Sleep(3 * time.Second)
				p.inSync()
			}
			p.closed()
			if took := time.Since(start); took != defaultHandshakeTimeout {
				t.Errorf("cut off after %v", took)
			}
			synctest.Wait()
			if len(s.Connections()) != 0 {
				t.Error("still counted")
			}
		})
	})
	t.Run("client that does not read", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			client, server := net.Pipe()
			defer func() { _ = client.Close() }()
			s := &Server{Exports: x, Mover: &inMemory{}, HandshakeTimeout: time.Minute}
			s.init()
			s.admit(server)
			time.Sleep(time.Minute - 1)
			synctest.Wait()
			if len(s.Connections()) != 1 {
				t.Error("cut off too early")
			}
			time.Sleep(time.Nanosecond)
			synctest.Wait()
			if len(s.Connections()) != 0 {
				t.Error("not cut off")
			}
		})
	})
}

func TestH10Shutdown(t *testing.T) {
	x, _ := testExports(t)
	stopping := func(h *handshake) { h.stopping = func() bool { return true } }
	p, done := greeted(t, x, stopping)
	for _, opt := range []uint32{wire.OptList, wire.OptGo, wire.OptStartTLS, wire.OptSetMetaContext, 99} {
		p.final(opt, goData(""), wire.RepErrShutdown)
	}
	p.final(wire.OptAbort, nil, wire.RepAck)
	p.closed()
	if o := <-done; !errors.Is(o.err, errAbort) {
		t.Error(o.err)
	}

	p, done = greeted(t, x, stopping)
	p.send(wire.OptExportName, nil)
	p.closed()
	if o := <-done; !errors.Is(o.err, errStopping) {
		t.Error(o.err)
	}

	// The stop may come between the option and its effect.
	p, _ = greeted(t, x, func(h *handshake) { h.enter = func(*Export) error { return errStopping } })
	p.final(wire.OptGo, goData(""), wire.RepErrShutdown)
}

func TestO1ExportName(t *testing.T) {
	only := new(Exports)
	if err := only.Add(&Export{Name: "disk", Disk: &ioloop.Disk{Image: newImage(1)}}); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"", "none", "dis", "disk2", "\xff", strings.Repeat("x", 4096), strings.Repeat("x", 4097)} {
		p, done := greeted(t, only)
		p.write(optionHeader(wire.OptExportName, uint32(len(name))))
		if len(name) <= wire.MaxString {
			_, _ = p.nc.Write([]byte(name))
		}
		p.closed()
		if o := <-done; o.err == nil {
			t.Errorf("%.10q was accepted", name)
		}
	}
	p, done := greeted(t, only)
	p.send(wire.OptExportName, []byte("disk"))
	p.read(10)
	if o := <-done; o.err != nil || o.export.Name != "disk" || o.terms.size != 1 {
		t.Errorf("%+v", o)
	}
	// "" is a name like any other, in GO too.
	p, _ = greeted(t, only)
	p.final(wire.OptGo, goData(""), wire.RepErrUnknown)
}

func TestO2Abort(t *testing.T) {
	x, _ := testExports(t)
	for _, data := range [][]byte{nil, []byte("bye"), make([]byte, maxOptionData+1)} {
		p, done := greeted(t, x)
		p.final(wire.OptAbort, data, wire.RepAck)
		p.closed()
		if o := <-done; !errors.Is(o.err, errAbort) {
			t.Error(o.err)
		}
	}
	p, done := greeted(t, x)
	p.send(wire.OptAbort, nil)
	_ = p.nc.Close() // does not wait
	if o := <-done; !errors.Is(o.err, errAbort) {
		t.Error(o.err)
	}
}

func TestO3List(t *testing.T) {
	x, _ := testExports(t)
	p, _ := greeted(t, x)
	for range 2 {
		r := p.do(wire.OptList, nil)
		want := [][]byte{be32(0), append(be32(2), "roread only"...), {}}
		if len(r) != 3 || r[0].typ != wire.RepServer || r[1].typ != wire.RepServer || r[2].typ != wire.RepAck {
			t.Fatalf("%x", r)
		}
		for i := range want {
			if !bytes.Equal(r[i].data, want[i]) {
				t.Errorf("entry %d: %q, want %q", i, r[i].data, want[i])
			}
		}
	}
	many := new(Exports)
	for i := range 1000 {
		e := &Export{Name: fmt.Sprintf("%04d", i), Description: strings.Repeat("d", 4096), Disk: &ioloop.Disk{Image: newImage(1)}}
		if err := many.Add(e); err != nil {
			t.Fatal(err)
		}
	}
	var h *handshake
	p, done := greeted(t, many, func(x *handshake) { h = x })
	if r := p.do(wire.OptList, nil); len(r) != 1001 {
		t.Errorf("%d replies", len(r))
	}
	p.final(wire.OptAbort, nil, wire.RepAck)
	<-done
	if cap(h.out) > 4*flushAt {
		t.Errorf("a long list took a buffer of %d bytes", cap(h.out))
	}
}

// infosOf sorts the INFO replies of INFO and GO by their type.
func infosOf(t *testing.T, r []reply) map[uint16][]byte {
	t.Helper()
	m := make(map[uint16][]byte)
	for i, r := range r {
		if r.typ == wire.RepAck {
			break
		}
		if r.typ != wire.RepInfo || len(r.data) < 2 {
			t.Fatalf("reply %d: %+v", i, r)
		}
		typ := binary.BigEndian.Uint16(r.data)
		if m[typ] != nil {
			t.Fatalf("info %d twice", typ)
		}
		m[typ] = r.data[2:]
	}
	return m
}

func TestO7O10O11Infos(t *testing.T) {
	x, _ := testExports(t)
	blocks := be32(1, 4096, 32<<20)
	for _, tt := range []struct {
		row      string
		name     string
		requests []uint16
		want     map[uint16][]byte // without EXPORT and BLOCK_SIZE, which always come
	}{
		{"O7 nothing asked", "", nil, nil},
		{"O7 EXPORT asked", "", []uint16{wire.InfoExport}, nil},
		{"O7 unknown ignored", "", []uint16{77, 0xffff, 4}, nil},
		{"O10 BLOCK_SIZE asked", "", []uint16{wire.InfoBlockSize}, nil},
		{"O11 NAME", "ro", []uint16{wire.InfoName}, map[uint16][]byte{wire.InfoName: []byte("ro")}},
		{"O11 empty NAME", "", []uint16{wire.InfoName, wire.InfoDescription}, map[uint16][]byte{wire.InfoName: {}}},
		{"O11 all, twice", "ro",
			[]uint16{wire.InfoDescription, wire.InfoName, wire.InfoDescription, wire.InfoName, wire.InfoExport, wire.InfoBlockSize},
			map[uint16][]byte{wire.InfoName: []byte("ro"), wire.InfoDescription: []byte("read only")}},
	} {
		for _, opt := range []uint32{wire.OptInfo, wire.OptGo} {
			t.Run(tt.row+" "+optionName(opt), func(t *testing.T) {
				p, done := greeted(t, x)
				got := infosOf(t, p.do(opt, goData(tt.name, tt.requests...)))
				e := got[wire.InfoExport]
				if len(e) != 10 || binary.BigEndian.Uint64(e) != map[string]uint64{"": testSize, "ro": 512}[tt.name] {
					t.Errorf("EXPORT %x", e)
				}
				if !bytes.Equal(got[wire.InfoBlockSize], blocks) {
					t.Errorf("BLOCK_SIZE %x", got[wire.InfoBlockSize])
				}
				if len(got) != 2+len(tt.want) {
					t.Errorf("got %v", got)
				}
				for typ, want := range tt.want {
					if b, ok := got[typ]; !ok || !bytes.Equal(b, want) {
						t.Errorf("info %d: %q, want %q", typ, b, want)
					}
				}
				if opt == wire.OptInfo {
					p.inSync()
					return
				}
				if o := <-done; o.err != nil || o.export.Name != tt.name { // O12
					t.Errorf("%+v", o)
				}
			})
		}
	}
}

func TestO9InfoThenGo(t *testing.T) {
	sizeOf := func(t *testing.T, r []reply) int64 {
		t.Helper()
		return int64(binary.BigEndian.Uint64(infosOf(t, r)[wire.InfoExport]))
	}
	data := goData("", wire.InfoName)
	for _, tt := range []struct {
		row     string
		between func(*peer)
		goData  []byte
		want    int64
	}{
		{"nothing between", func(*peer) {}, data, testSize},
		{"another option between", func(p *peer) { p.inSync() }, data, 4096},
		{"a failed option between", func(p *peer) { p.final(99, nil, wire.RepErrUnsup) }, data, 4096},
		{"a failed GO between", func(p *peer) { p.final(wire.OptGo, goData("none"), wire.RepErrUnknown) }, data, 4096},
		{"other parameters", func(*peer) {}, goData(""), 4096},
	} {
		t.Run(tt.row, func(t *testing.T) {
			x, img := testExports(t)
			p, done := greeted(t, x)
			if n := sizeOf(t, p.do(wire.OptInfo, data)); n != testSize {
				t.Fatalf("INFO: %d", n)
			}
			img.size.Store(4096) // another owner has shrunk it
			tt.between(p)
			if n := sizeOf(t, p.do(wire.OptGo, tt.goData)); n != tt.want {
				t.Errorf("GO: %d, want %d", n, tt.want)
			}
			if o := <-done; o.terms.size != tt.want {
				t.Errorf("the connection has %d", o.terms.size)
			}
		})
	}
	t.Run("export replaced", func(t *testing.T) {
		x, _ := testExports(t)
		p, _ := greeted(t, x)
		p.do(wire.OptInfo, data)
		x.Remove("")
		p.final(wire.OptGo, data, wire.RepErrUnknown)
	})
	t.Run("export removed under GO", func(t *testing.T) {
		x, _ := testExports(t)
		p, _ := greeted(t, x, func(h *handshake) { h.enter = func(*Export) error { return errGone } })
		p.final(wire.OptGo, data, wire.RepErrUnknown)
		p.inSync()
	})
}

func TestO13Structured(t *testing.T) {
	x, _ := testExports(t)
	p, done := greeted(t, x)
	p.final(wire.OptStructuredReply, nil, wire.RepAck)
	p.final(wire.OptStructuredReply, nil, wire.RepAck) // again is harmless
	flags := binary.BigEndian.Uint16(infosOf(t, p.do(wire.OptGo, goData("")))[wire.InfoExport][8:])
	if flags&wire.TransSendDF == 0 { // F5
		t.Errorf("flags %#x without DF", flags)
	}
	if o := <-done; !o.terms.structured || selectedIn(o.terms) {
		t.Errorf("%+v", o.terms)
	}
}

func TestO14O15O16Meta(t *testing.T) {
	x, _ := testExports(t)
	context := func(id uint32) []byte { return append(be32(id), "base:allocation"...) }
	for _, opt := range []uint32{wire.OptListMetaContext, wire.OptSetMetaContext} {
		t.Run("without structured replies "+optionName(opt), func(t *testing.T) {
			p, _ := greeted(t, x)
			p.final(opt, metaData("", "base:allocation"), wire.RepErrInvalid)
			p.inSync()
		})
	}
	many := make([]string, 1000)
	for i := range many {
		many[i] = fmt.Sprintf("x-%d:y", i)
	}
	for _, tt := range []struct {
		row       string
		queries   []string
		list, set bool // base:allocation is in the reply
	}{
		{"zero queries", nil, true, false},
		{"exact", []string{"base:allocation"}, true, true},
		{"wildcard", []string{"base:"}, true, false},
		{"duplicate", []string{"base:allocation", "base:allocation", "base:"}, true, true},
		{"unknown leaf", []string{"base:foo"}, false, false},
		{"unknown namespace", []string{"qemu:dirty-bitmap:x", "x-y:"}, false, false},
		{"unknown and known", []string{"x-y:z", "base:allocation"}, true, true},
		{"no namespace", []string{"", "allocation", "base"}, false, false},
		{"many", many, false, false},
	} {
		t.Run(tt.row, func(t *testing.T) {
			p, done := greeted(t, x)
			p.final(wire.OptStructuredReply, nil, wire.RepAck)
			check := func(opt uint32, want bool, id uint32) {
				t.Helper()
				r := p.do(opt, metaData("ro", tt.queries...))
				if want && (len(r) != 2 || r[0].typ != wire.RepMetaContext || !bytes.Equal(r[0].data, context(id))) ||
					!want && len(r) != 1 || r[len(r)-1].typ != wire.RepAck {
					t.Errorf("%s: %x", optionName(opt), r)
				}
			}
			check(wire.OptListMetaContext, tt.list, 0)
			check(wire.OptSetMetaContext, tt.set, 1)
			check(wire.OptListMetaContext, tt.list, 0) // LIST changes nothing
			p.do(wire.OptGo, goData("ro"))
			if o := <-done; selectedIn(o.terms) != tt.set {
				t.Errorf("selected: %v, want %v", o.terms.contexts, tt.set)
			}
		})
	}
}

// What QEMU's server answers for an export with bitmaps.
func TestMetaOfBitmaps(t *testing.T) {
	x := new(Exports)
	if err := x.Add(&Export{Name: "", Disk: &ioloop.Disk{Image: newImage(512)}, Bitmaps: []string{"one", "two"}}); err != nil {
		t.Fatal(err)
	}
	if err := x.Add(&Export{Name: "none", Disk: &ioloop.Disk{Image: newImage(512)}}); err != nil {
		t.Fatal(err)
	}
	const base, one, two = "base:allocation", "qemu:dirty-bitmap:one", "qemu:dirty-bitmap:two"
	ids := map[string]uint32{base: 1, one: 2, two: 3}
	for _, tt := range []struct {
		export    string
		queries   []string
		list, set []string
	}{
		{"", nil, []string{base, one, two}, nil},
		{"", []string{"qemu:"}, []string{one, two}, nil},
		{"", []string{"qemu:dirty-bitmap:"}, []string{one, two}, nil},
		{"", []string{"base:"}, []string{base}, nil},
		{"", []string{two, base}, []string{base, two}, []string{base, two}},
		{"", []string{two, "qemu:", two}, []string{one, two}, []string{two}},
		{"", []string{"qemu:dirty-bitmap:three", "qemu:dirty-bitmap", "qemu:allocation-depth", "dirty-bitmap:one", "QEMU:"}, nil, nil},
		{"none", []string{"qemu:dirty-bitmap:", base, one}, []string{base}, []string{base}},
	} {
		p, done := greeted(t, x)
		p.final(wire.OptStructuredReply, nil, wire.RepAck)
		for opt, want := range map[uint32][]string{wire.OptListMetaContext: tt.list, wire.OptSetMetaContext: tt.set} {
			r := p.do(opt, metaData(tt.export, tt.queries...))
			var got []string
			for _, m := range r[:len(r)-1] {
				name := string(m.data[4:])
				got = append(got, name)
				id := uint32(0)
				if opt == wire.OptSetMetaContext {
					id = ids[name]
				}
				if m.typ != wire.RepMetaContext || binary.BigEndian.Uint32(m.data) != id {
					t.Errorf("%q: %s: %x", tt.queries, optionName(opt), m)
				}
			}
			if !slices.Equal(got, want) || r[len(r)-1].typ != wire.RepAck {
				t.Errorf("%q: %s: %q, want %q", tt.queries, optionName(opt), got, want)
			}
		}
		p.do(wire.OptGo, goData(tt.export))
		var got []string
		for _, m := range (<-done).terms.contexts {
			got = append(got, m.name())
		}
		if !slices.Equal(got, tt.set) {
			t.Errorf("%q: agreed on %q, want %q", tt.queries, got, tt.set)
		}
	}
	for _, names := range [][]string{{""}, {"a", "a"}, {"\xff"}, {strings.Repeat("x", 4096)}} {
		if err := x.Add(&Export{Name: "bad", Disk: &ioloop.Disk{Image: newImage(512)}, Bitmaps: names}); err == nil {
			t.Errorf("%.10q was accepted", names)
		}
	}
}

// O15: the last SET counts, also one that failed. O17: for its export only.
func TestO15O17LastSet(t *testing.T) {
	x, _ := testExports(t)
	good := metaData("", "base:allocation")
	for _, tt := range []struct {
		row  string
		then []byte // a second SET
		name string // of GO
		want bool
	}{
		{"O17 same export", nil, "", true},
		{"O17 other export", nil, "ro", false},
		{"O15 replaced", metaData("", "x-y:z"), "", false},
		{"O15 zero queries", metaData(""), "", false},
		{"O15 failed: malformed", []byte("x"), "", false},
		{"O15 failed: unknown export", metaData("none", "base:allocation"), "", false},
		{"O15 failed: bad name", metaData("\xff", "base:allocation"), "", false},
		{"O15 failed: too long", make([]byte, maxOptionData+1), "", false},
		{"O17 last one for another export", metaData("ro", "base:allocation"), "", false},
		{"O17 last one for this export", metaData("ro", "base:allocation"), "ro", true},
	} {
		for _, opt := range []uint32{wire.OptGo, wire.OptExportName} {
			t.Run(tt.row+" "+optionName(opt), func(t *testing.T) {
				p, done := greeted(t, x)
				p.final(wire.OptStructuredReply, nil, wire.RepAck)
				p.do(wire.OptSetMetaContext, good)
				if tt.then != nil {
					p.do(wire.OptSetMetaContext, tt.then)
				}
				if opt == wire.OptGo {
					p.do(opt, goData(tt.name))
				} else {
					p.send(opt, []byte(tt.name))
					p.read(10)
				}
				if o := <-done; o.err != nil || selectedIn(o.terms) != tt.want {
					t.Errorf("%v, context %v, want %v", o.err, o.terms.contexts, tt.want)
				}
			})
		}
	}
}

// What follows the last option is left for whoever gets the connection next.
func TestNoReadAhead(t *testing.T) {
	x, _ := testExports(t)
	tail := requestHeader(0, wire.CmdRead, 1, 0, 512)
	in := be32(fixedNoZeroes)
	in = append(in, optionHeader(wire.OptGo, 6)...)
	in = append(in, goData("")...)
	conn := &recorded{in: bytes.NewReader(append(in, tail...))}
	h := &handshake{
		conn: conn, exports: x,
		stopping: func() bool { return false }, enter: func(*Export) error { return nil },
	}
	if _, err := h.run(); err != nil {
		t.Fatal(err)
	}
	if rest, _ := io.ReadAll(conn.in); !bytes.Equal(rest, tail) {
		t.Errorf("%d bytes are left, want %d", len(rest), len(tail))
	}
}

// Every place where a client may leave ends the handshake with an error.
func TestClientLeaves(t *testing.T) {
	x, _ := testExports(t)
	in := be32(fixedNoZeroes)
	in = append(in, optionHeader(wire.OptInfo, 8)...)
	in = append(in, goData("", wire.InfoName)...)
	in = append(in, optionHeader(88, maxOptionData+9)...)
	in = append(in, make([]byte, maxOptionData+9)...)
	for n := 0; n <= len(in); n += 1 + n/50 {
		h := &handshake{
			conn: &recorded{in: bytes.NewReader(in[:n])}, exports: x,
			stopping: func() bool { return false }, enter: func(*Export) error { return nil },
		}
		if _, err := h.run(); !quiet(err) || errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("after %d bytes: %v", n, err)
		}
	}
}

// recorded is a connection whose input is given and whose output is kept.
type recorded struct {
	net.Conn
	in  *bytes.Reader
	out bytes.Buffer
}

func (r *recorded) Read(b []byte) (int, error)  { return r.in.Read(b) }
func (r *recorded) Write(b []byte) (int, error) { return r.out.Write(b) }
