package integration

import (
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// nbdinfo runs nbdinfo and decodes its JSON.
func nbdinfo(t testing.TB, into any, args ...string) {
	t.Helper()
	need(t, "nbdinfo", "libnbd-bin")
	out := run(t, append([]string{"nbdinfo", "--json"}, args...)...)
	if err := json.Unmarshal([]byte(out), into); err != nil {
		t.Fatalf("nbdinfo: %v\n%s", err, out)
	}
}

func TestNBDInfo(t *testing.T) {
	everyServer(t, func(t *testing.T, kind string) {
		for _, readOnly := range []bool{false, true} {
			t.Run(fmt.Sprintf("readonly=%v", readOnly), func(t *testing.T) {
				image := sparseImage(t, tmpfsDir(t), 24*mib)
				s := startTarget(t, kind, image, targetOptions{
					name: "disk one/ü", description: "The second disk, “quoted”", readOnly: readOnly})
				uri := strings.Replace(s.uri, "disk one/ü", "disk%20one/%C3%BC", 1)
				var got struct {
					Protocol   string
					TLS        bool
					Structured bool
					Exports    []map[string]any
				}
				nbdinfo(t, &got, uri)
				if got.Protocol != "newstyle-fixed" || got.TLS || !got.Structured || len(got.Exports) != 1 {
					t.Fatalf("nbdinfo: %+v", got)
				}
				export := got.Exports[0]
				want := map[string]any{
					"export-name":        "disk one/ü",
					"description":        "The second disk, “quoted”",
					"content":            export["content"], // a guess of file(1)
					"uri":                export["uri"],     // what we gave, quoted anew
					"contexts":           []any{"base:allocation"},
					"is_rotational":      false,
					"is_read_only":       readOnly,
					"can_cache":          true,
					"can_df":             true,
					"can_fast_zero":      !readOnly,
					"can_flush":          true,
					"can_fua":            true,
					"can_multi_conn":     true,
					"can_trim":           !readOnly,
					"can_zero":           !readOnly,
					"block_size_minimum": 1.0, "block_size_preferred": 4096.0, "block_size_maximum": 32.0 * mib,
					"export-size": 24.0 * mib, "export-size-str": "24M",
				}
				if kind == "qemu-nbd" { // which has these advertised on a read-only export, too
					for _, k := range []string{"can_fast_zero", "can_trim", "can_zero"} {
						want[k] = export[k]
					}
				}
				for _, k := range slices.Sorted(maps.Keys(want)) {
					if fmt.Sprint(export[k]) != fmt.Sprint(want[k]) {
						t.Errorf("%s: %v, want %v", k, export[k], want[k])
					}
					delete(export, k)
				}
				if len(export) != 0 {
					t.Errorf("not checked: %v", export)
				}
			})
		}
	})
}

func TestNBDInfoList(t *testing.T) {
	everyServer(t, func(t *testing.T, kind string) {
		s := startTarget(t, kind, sparseImage(t, tmpfsDir(t), mib), targetOptions{name: "disk", description: "first"})
		var got struct {
			Exports []struct {
				Name        string `json:"export-name"`
				Description string
				Size        int64 `json:"export-size"`
			}
		}
		nbdinfo(t, &got, "--list", nbdURI("", s.socket))
		if len(got.Exports) != 1 || got.Exports[0].Name != "disk" || got.Exports[0].Description != "first" ||
			got.Exports[0].Size != mib {
			t.Errorf("nbdinfo --list: %+v", got)
		}
	})
}

// allocation is a run of an image as nbdinfo --map and qemu-img map tell it.
type allocation struct {
	offset, length int64
	hole, zero     bool
}

func mergeAllocations(all []allocation) []allocation {
	var merged []allocation
	for _, a := range all {
		if n := len(merged); n > 0 && merged[n-1].hole == a.hole && merged[n-1].zero == a.zero {
			merged[n-1].length += a.length
		} else {
			merged = append(merged, a)
		}
	}
	return merged
}

func nbdMap(t testing.TB, uri string) []allocation {
	t.Helper()
	var list []struct {
		Offset, Length int64
		Type           int
	}
	nbdinfo(t, &list, "--map", uri)
	var all []allocation
	for _, e := range list {
		all = append(all, allocation{e.Offset, e.Length, e.Type&1 != 0, e.Type&2 != 0})
	}
	return mergeAllocations(all)
}

func qemuMap(t testing.TB, image string) []allocation {
	t.Helper()
	need(t, "qemu-img", "qemu-utils")
	var list []struct {
		Start, Length int64
		Data, Zero    bool
	}
	out := run(t, "qemu-img", "map", "-U", "--output=json", "-f", "raw", image)
	if err := json.Unmarshal([]byte(out), &list); err != nil {
		t.Fatal(err)
	}
	var all []allocation
	for _, e := range list {
		all = append(all, allocation{e.Start, e.Length, !e.Data, e.Zero})
	}
	return mergeAllocations(all)
}

func TestNBDMapIsQemuMap(t *testing.T) {
	everyServer(t, func(t *testing.T, kind string) {
		everyPlace(t, func(t *testing.T, dir string) {
			image := patchyImage(t, dir, 24*mib)
			s := startTarget(t, kind, image, targetOptions{})
			compare := func(when string) {
				t.Helper()
				got, want := nbdMap(t, s.uri), qemuMap(t, image)
				if !slices.Equal(got, want) {
					t.Errorf("%s:\nnbdinfo --map %+v\nqemu-img map  %+v", when, got, want)
				}
				if kind == "nbd-export" && len(want) < 8 {
					t.Errorf("%s: the image has only %d runs", when, len(want))
				}
			}
			compare("at first")
			mustQemuIO(t, s.uri, "discard 0 64k", "write 20M 256k", "write -z -u 4M 1M", "flush")
			compare("after changes")
		})
	})
}

func TestNBDCopyBothWays(t *testing.T) {
	need(t, "nbdcopy", "libnbd-bin")
	everyServer(t, func(t *testing.T, kind string) {
		everyPlace(t, func(t *testing.T, dir string) {
			source := patchyImage(t, t.TempDir(), 40*mib)
			image := randomImage(t, dir, 4, 40*mib)
			s := startTarget(t, kind, image, targetOptions{})
			run(t, "nbdcopy", "--flush", source, s.uri)
			back := filepath.Join(t.TempDir(), "back")
			if err := os.WriteFile(back, nil, 0o600); err != nil {
				t.Fatal(err)
			}
			run(t, "nbdcopy", s.uri, back)
			want := sum(readFile(t, source))
			if got := sum(readFile(t, image)); got != want {
				t.Errorf("copied to the export: %s, want %s", got, want)
			}
			if got := sum(readFile(t, back)); got != want {
				t.Errorf("copied back: %s, want %s", got, want)
			}
		})
	})
}

func TestLibNBDCommands(t *testing.T) {
	everyServer(t, func(t *testing.T, kind string) {
		everyPlace(t, func(t *testing.T, dir string) {
			image := randomImage(t, dir, 5, 8*mib)
			s := startTarget(t, kind, image, targetOptions{})
			python(t, s.uri, `
h = connect("base:allocation")
assert h.get_size() == 8 << 20
assert h.get_structured_replies_negotiated()

# FUA on everything that can carry it.
h.pwrite(b"durable!" * 512, 0, nbd.CMD_FLAG_FUA)
assert h.pread(4096, 0) == b"durable!" * 512
h.zero(4096, 4096, nbd.CMD_FLAG_FUA)
h.trim(65536, 65536, nbd.CMD_FLAG_FUA)
assert h.pread(4096, 4096) == bytes(4096)
h.flush()

# CACHE is a hint.
h.cache(1 << 20, 0)

# NO_HOLE stays allocated, without it a hole may come.
h.zero(1 << 20, 2 << 20, nbd.CMD_FLAG_NO_HOLE)
assert h.pread(1 << 20, 2 << 20) == bytes(1 << 20)

# FAST_ZERO is quick or refused, and then changes nothing.
if h.can_fast_zero():
    for flags in (0, nbd.CMD_FLAG_NO_HOLE):
        before = h.pread(65536, 5 << 20)
        try:
            h.zero(65536, 5 << 20, nbd.CMD_FLAG_FAST_ZERO | flags)
            want = bytes(65536)
        except nbd.Error as e:
            assert e.errno == "ENOTSUP" or e.errno == "EOPNOTSUPP", e
            want = before
        assert h.pread(65536, 5 << 20) == want

def extents(length, offset, flags=0):
    got = []
    def cb(context, off, entries, err):
        assert context == "base:allocation" and off == offset, (context, off)
        got.extend(zip(entries[::2], entries[1::2]))
    h.block_status(length, offset, cb, flags)
    return got

h.zero(1 << 20, 3 << 20)
h.flush()
every = extents(8 << 20, 0)
assert every
total = 0
for i, (length, flags) in enumerate(every):
    assert length > 0 and flags & ~3 == 0, every
    if i + 1 < len(every):
        total += length
        assert flags != every[i + 1][1], ("not merged", every)
assert total < 8 << 20, every
one = extents(8 << 20, 0, nbd.CMD_FLAG_REQ_ONE)
assert len(one) == 1 and one[0][0] <= 8 << 20, one
assert one[0] == every[0], (one, every)
assert extents(512, 3 << 20, nbd.CMD_FLAG_REQ_ONE)[0][1] & 2, "zeroes do not read as zero"

# DF: one piece, holes and all.
pieces = []
def piece(buf, off, status, err):
    pieces.append((off, len(buf), status))
h.pread_structured(4 << 20, 1 << 20, piece, nbd.CMD_FLAG_DF)
assert len(pieces) == 1 and pieces[0] == (1 << 20, 4 << 20, nbd.READ_DATA), pieces
pieces.clear()
h.pread_structured(4 << 20, 1 << 20, piece)
assert sum(n for _, n, _ in pieces) == 4 << 20, pieces
h.shutdown()
`)
		})
	})
}

// A read of holes in pieces is smaller on the wire than its bytes.
func TestLibNBDHolesInReads(t *testing.T) {
	everyPlace(t, func(t *testing.T, dir string) {
		e := serve(t, patchyImage(t, dir, 8*mib))
		python(t, e.uri(), `
h = connect()
data = h.pread(8 << 20, 0)
holes = []
def piece(buf, off, status, err):
    assert data[off:off + len(buf)] == bytes(buf)
    if status == nbd.READ_HOLE:
        holes.append((off, len(buf)))
h.pread_structured(8 << 20, 0, piece)
assert holes, "no hole was sent as a hole"
h.shutdown()
`)
	})
}

// errorRules are the checklist's C1 to C20 as far as a client sees them.
const errorRules = `
h = connect("base:allocation")
size = h.get_size()
past = size + 4096
payload = bytes(4096)

def nothing(*args):
    return 0

# Past the end, at it and over it, without overflow.
for off, n in ((size, 4096), (size - 512, 4096), (past, 4096), (2**63 - 1, 4096), (2**64 - 1, 4096), (2**64 - 4096, 4096)):
    fails("EINVAL", h.pread, n, off)
    fails("EINVAL", h.trim, n, off)
    fails("EINVAL", h.cache, n, off)
    fails("EINVAL", h.block_status, n, off, nothing)
    fails(PAST_END_WRITE, h.pwrite, payload, off)
    fails(PAST_END_WRITE, h.zero, n, off)

# A length beyond the end is checked without wrapping around.
fails("EINVAL", h.trim, 2**32 - 1, size - 1)
fails(PAST_END_WRITE, h.zero, 2**32 - 1, size - 1)

# Flags that the command does not have, and flags that nothing has.
for flag in (nbd.CMD_FLAG_DF, nbd.CMD_FLAG_NO_HOLE, nbd.CMD_FLAG_REQ_ONE, nbd.CMD_FLAG_FAST_ZERO, 1 << 15):
    fails("EINVAL", h.pwrite, payload, 0, flag)
    fails("EINVAL", h.trim, 4096, 0, flag)
    fails("EINVAL", h.cache, 4096, 0, flag)
    fails("EINVAL", h.flush, flag)
for flag in (nbd.CMD_FLAG_NO_HOLE, nbd.CMD_FLAG_REQ_ONE, nbd.CMD_FLAG_FAST_ZERO, 1 << 15):
    fails("EINVAL", h.pread_structured, 4096, 0, nothing, flag)
for flag in (nbd.CMD_FLAG_DF, nbd.CMD_FLAG_REQ_ONE, 1 << 15):
    fails("EINVAL", h.zero, 4096, 0, flag)
for flag in (nbd.CMD_FLAG_DF, nbd.CMD_FLAG_NO_HOLE, nbd.CMD_FLAG_FAST_ZERO, 1 << 15):
    fails("EINVAL", h.block_status, 4096, 0, nothing, flag)

# FUA is valid on every command once it is advertised.
h.pread_structured(4096, 0, nothing, nbd.CMD_FLAG_FUA)
h.block_status(4096, 0, nothing, nbd.CMD_FLAG_FUA)
h.cache(4096, 0, nbd.CMD_FLAG_FUA)

# After all of that the connection works and nothing is out of step.
h.pwrite(b"still in step...", 1000)
assert h.pread(16, 1000) == b"still in step..."

# Without a context there is no status.
plain = connect()
fails("EINVAL", plain.block_status, 4096, 0, nothing)
assert plain.pread(16, 1000) == b"still in step..."
plain.shutdown()
h.shutdown()
`

func TestLibNBDErrors(t *testing.T) {
	everyServer(t, func(t *testing.T, kind string) {
		s := startTarget(t, kind, randomImage(t, tmpfsDir(t), 6, mib), targetOptions{})
		pastEnd := "ENOSPC"
		if kind == "qemu-nbd" {
			pastEnd = "EINVAL" // where the protocol has ENOSPC
		}
		python(t, s.uri, fmt.Sprintf("PAST_END_WRITE = %q\n", pastEnd)+errorRules)
	})
}

func TestLibNBDReadOnly(t *testing.T) {
	everyServer(t, func(t *testing.T, kind string) {
		image := randomImage(t, tmpfsDir(t), 7, mib)
		before := snap(t, image)
		s := startTarget(t, kind, image, targetOptions{readOnly: true})
		refused := "EPERM"
		if kind == "qemu-nbd" {
			refused = "EINVAL" // where the protocol has EPERM
		}
		python(t, s.uri, fmt.Sprintf("REFUSED = %q\n", refused)+`
h = connect("base:allocation")
assert h.is_read_only()
for i in range(3):
    fails(REFUSED, h.pwrite, bytes(65536), 0)
    fails(REFUSED, h.zero, 65536, 0)
    fails(REFUSED, h.trim, 65536, 0)
h.flush()
h.cache(65536, 0)
h.block_status(65536, 0, lambda *args: 0)
assert len(h.pread(65536, 0)) == 65536
h.shutdown()
`)
		sameSnap(t, image, before)
	})
}

func TestLibNBDUnknownExport(t *testing.T) {
	everyServer(t, func(t *testing.T, kind string) {
		s := startTarget(t, kind, sparseImage(t, tmpfsDir(t), mib), targetOptions{name: "disk"})
		python(t, nbdURI("", s.socket), fmt.Sprintf("socket = %q\n", s.socket)+`
h = nbd.NBD()
h.set_opt_mode(True)
h.connect_unix(socket)
h.set_export_name("no such")
fails("ENOENT", h.opt_info)
fails("ENOENT", h.opt_go)
# Still haggling: the right name works.
h.set_export_name("disk")
h.opt_info()
h.opt_go()
assert h.get_size() == 1 << 20
h.shutdown()
`)
	})
}

// The requests libnbd cannot send.
func TestProtocolErrors(t *testing.T) {
	everyServer(t, func(t *testing.T, kind string) {
		image := randomImage(t, tmpfsDir(t), 8, 64*mib)
		s := startTarget(t, kind, image, targetOptions{})
		c := dialRaw(t, s.socket, "")
		// Length 0 is odd but no reason to disconnect.
		for _, cmd := range []uint16{cmdRead, cmdWrite, cmdTrim, cmdWriteZeroes, cmdBlockStatus, cmdCache} {
			if rep := c.do(cmd, 0, 0, 0, nil); rep.errno != 0 && rep.errno != nbdEINVAL {
				t.Errorf("command %d of length 0: %s", cmd, errName(rep.errno))
			}
		}
		c.want(nbdEINVAL, 99, 0, 0, 0, nil)
		c.want(nbdEINVAL, 8, 0, 0, 0, nil)
		c.want(nbdEINVAL, cmdRead, 1<<14, 0, 512, nil)
		// The text of an error is there for people.
		if rep := c.want(nbdEINVAL, cmdRead, 0, 64*mib, 512, nil); rep.text == "" {
			t.Error("an error without a text")
		}
		// The largest request is served, a larger READ refused.
		if rep := c.want(0, cmdRead, 0, 0, 32*mib, nil); rep.errno == 0 {
			sameBytes(t, "the largest read", rep.data, fileAt(t, image, 0, 32*mib))
		}
		c.want(nbdEINVAL, cmdRead, 0, 0, 32*mib+1, nil)
		// What carries no payload has no such limit.
		c.want(0, cmdWriteZeroes, 0, 0, 64*mib, nil)
		c.want(0, cmdTrim, 0, 0, 64*mib, nil)
		// A WRITE too long is answered or cut off, never believed.
		c.want(0, cmdWrite, 0, 4096, 4, []byte("same"))
		sameBytes(t, "after all of that", c.want(0, cmdRead, 0, 4096, 4, nil).data, []byte("same"))
		// Closing in order: nothing is sent any more.
		c.send(cmdDisc, 0, 0, 0, nil)
		c.wantClosed(startTimeout)

		// A request without its magic ends the connection, no other.
		bad, good := dialSimple(t, s.socket, ""), dialSimple(t, s.socket, "")
		bad.write(make([]byte, 28))
		bad.wantClosed(startTimeout)
		sameBytes(t, "the other connection", good.want(0, cmdRead, 0, 4096, 4, nil).data, []byte("same"))
	})
}

// The options libnbd does not send, or not like this.
func TestProtocolOptions(t *testing.T) {
	everyServer(t, func(t *testing.T, kind string) {
		s := startTarget(t, kind, sparseImage(t, tmpfsDir(t), mib), targetOptions{name: "disk", description: "d"})
		c := dialNBD(t, "unix", s.socket)
		c.clientFlags(3)
		final := func(what string, want uint32, replies []optionReply) {
			t.Helper()
			if got := replies[len(replies)-1].kind; got != want {
				t.Errorf("%s: reply %#x, want %#x", what, got, want)
			}
		}
		final("an unknown option", repErrUnsup, c.option(4711, []byte("some data to consume")))
		final("LIST with data", repErrInvalid, c.option(optList, []byte("x")))
		final("SET_META_CONTEXT before structured replies", repErrInvalid, c.option(optSetMeta, metaQuery("disk", "base:allocation")))
		final("STRUCTURED_REPLY with data", repErrInvalid, c.option(optStructured, []byte("x")))
		final("INFO whose name is longer than its data", repErrInvalid, c.option(optInfo, []byte{0, 0, 1, 0, 'x', 0, 0}))
		final("INFO cut short", repErrInvalid, c.option(optInfo, []byte{0, 0}))
		final("GO with data left over", repErrInvalid, c.option(optGo, append(goQuery("disk"), 0)))
		final("an unknown export", repErrUnknown, c.option(optGo, goQuery("else")))
		final("STRUCTURED_REPLY", repAck, c.option(optStructured, nil))
		// Contexts: the wildcard works in a list and is ignored in a set.
		list := c.option(optListMeta, metaQuery("disk", "base:"))
		final("LIST_META_CONTEXT", repAck, list)
		if len(list) != 2 || list[0].kind != repMeta || string(list[0].data[4:]) != "base:allocation" {
			t.Errorf("LIST_META_CONTEXT base: %+v", list)
		}
		final("LIST_META_CONTEXT of an unknown export", repErrUnknown, c.option(optListMeta, metaQuery("else")))
		if set := c.option(optSetMeta, metaQuery("disk", "base:", "other:thing")); len(set) != 1 || set[0].kind != repAck {
			t.Errorf("SET_META_CONTEXT of a wildcard: %+v", set)
		}
		final("SET_META_CONTEXT cut short", repErrInvalid, c.option(optSetMeta, metaQuery("disk", "base:allocation")[:14]))
		// All information, twice the same, then GO.
		first := c.mustOption(optInfo, goQuery("disk", 1, 2, 3, 99))
		second := c.mustOption(optInfo, goQuery("disk", 1, 2, 3, 99))
		if fmt.Sprint(first) != fmt.Sprint(second) {
			t.Errorf("INFO twice:\n%v\n%v", first, second)
		}
		kinds := map[byte]string{}
		for _, r := range first[:len(first)-1] {
			kinds[r.data[1]] = string(r.data[2:])
		}
		if kinds[1] != "disk" || kinds[2] != "d" || len(kinds[3]) != 12 || len(kinds[0]) != 10 {
			t.Errorf("INFO with everything asked: %q", kinds)
		}
		c.structured = true
		c.goExport("disk")
		// No context is left: the last SET failed.
		c.want(nbdEINVAL, cmdBlockStatus, 0, 0, 4096, nil)

		// ABORT is acknowledged.
		c = dialNBD(t, "unix", s.socket)
		c.clientFlags(3)
		final("ABORT", repAck, c.option(optAbort, nil))
		c.wantClosed(startTimeout)

		// A client's flag that was not offered.
		c = dialNBD(t, "unix", s.socket)
		c.clientFlags(1 << 5)
		c.wantClosed(startTimeout)
	})
}

// The oldest way in, with and without its 124 zeroes.
func TestProtocolExportName(t *testing.T) {
	everyServer(t, func(t *testing.T, kind string) {
		s := startTarget(t, kind, randomImage(t, tmpfsDir(t), 9, mib), targetOptions{name: "disk"})
		for _, flags := range []uint32{1, 3} {
			c := dialNBD(t, "unix", s.socket)
			c.clientFlags(flags)
			c.write(append([]byte("IHAVEOPT\x00\x00\x00\x01\x00\x00\x00\x04"), "disk"...))
			var b [10 + 124]byte
			n := 10 + 124
			if flags&2 != 0 {
				n = 10
			}
			c.read(b[:n])
			if string(b[:8]) != "\x00\x00\x00\x00\x00\x10\x00\x00" || b[9]&1 == 0 {
				t.Errorf("EXPORT_NAME: % x", b[:10])
			}
			for _, z := range b[10:n] {
				if z != 0 {
					t.Fatal("EXPORT_NAME: padding is not zero")
				}
			}
			sameBytes(t, "a read", c.want(0, cmdRead, 0, 12345, 678, nil).data, fileAt(t, s.image, 12345, 678))
		}
		c := dialNBD(t, "unix", s.socket)
		c.clientFlags(3)
		c.write(append([]byte("IHAVEOPT\x00\x00\x00\x01\x00\x00\x00\x04"), "else"...))
		c.wantClosed(startTimeout)
	})
}
