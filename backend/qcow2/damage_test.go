package qcow2

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/nbd-export/nbd-export/backend/qcow2/memfile"
)

// verdict is what a check or a repair comes to: as of "qemu-img check
// --output=json", with its exit status.
type verdict struct {
	Status           int
	Corruptions      int64 `json:"corruptions"`
	Leaks            int64 `json:"leaks"`
	CorruptionsFixed int64 `json:"corruptions-fixed"`
	LeaksFixed       int64 `json:"leaks-fixed"`
	CheckErrors      int64 `json:"check-errors"`
	EndOffset        int64 `json:"image-end-offset"`
	Total            int64 `json:"total-clusters"`
	Allocated        int64 `json:"allocated-clusters"`
	Fragmented       int64 `json:"fragmented-clusters"`
	Compressed       int64 `json:"compressed-clusters"`
}

// qemuVerdict has qemu-img check, and with repair mend, the image at path; says
// is what it printed.
func qemuVerdict(t *testing.T, path, repair string) (v verdict, says string) {
	t.Helper()
	args := []string{"check", "-f", "qcow2", "--output=json", path}
	if repair != "" {
		args = append(args, "-r", repair)
	}
	var stdout, stderr strings.Builder
	cmd := exec.Command("qemu-img", args...)
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	exit, failed := err.(*exec.ExitError)
	if err != nil && !failed {
		t.Fatalf("%v (package qemu-utils)", err)
	}
	if stdout.Len() > 0 {
		if err := json.Unmarshal([]byte(stdout.String()), &v); err != nil {
			t.Fatalf("qemu-img check says %s", stdout.String())
		}
	}
	if failed {
		v.Status = exit.ExitCode()
	}
	return v, stderr.String()
}

// ourVerdict is the same of ours.
func ourVerdict(f *memfile.File, repair string) (v verdict, says string) {
	h, err := ReadHeader(f)
	var before, after *Report
	switch {
	case err != nil:
	case repair == "":
		after, err = Check(f, h, nil)
		before = after
	case repair == "leaks":
		before, after, err = Mend(f, h, RepairLeaks, nil)
	default:
		before, after, err = Mend(f, h, RepairAll, nil)
	}
	if err != nil {
		return verdict{Status: 1}, err.Error()
	}
	v = verdict{
		Corruptions: after.Corruptions, Leaks: after.Leaks, EndOffset: after.EndOffset,
		CorruptionsFixed: after.CorruptionsFixed, LeaksFixed: after.LeaksFixed,
		Total: after.Total, Allocated: after.Allocated, Fragmented: after.Fragmented, Compressed: after.Compressed,
	}
	switch {
	case v.Corruptions > 0:
		v.Status = 2
	case v.Leaks > 0:
		v.Status = 3
	}
	return v, strings.Join(before.Findings, "\n")
}

// spot is a place of metadata that is worth damaging.
type spot struct {
	what   string
	off, n int64
}

// spots of an image that is whole.
func spots(t *testing.T, f *memfile.File) []spot {
	t.Helper()
	h, err := ReadHeader(f)
	if err != nil {
		t.Fatal(err)
	}
	c := newChecker(f, h, nil)
	if err := c.run(); err != nil || !c.r.Clean() {
		t.Fatal(err, c.r.Findings)
	}
	all := []spot{{"header", 0, int64(h.Length)}, {"header", int64(h.Length), 48}}
	entries := func(what string, off, n, width int64) {
		for k := range n {
			at := off + k*width
			if raw := f.Bytes()[at:min(at+width, f.Length())]; !bytes.Equal(raw, make([]byte, len(raw))) {
				all = append(all, spot{what, at, width})
			}
		}
	}
	entries("L1", h.L1Offset, int64(h.L1Entries), 8)
	for l2 := range c.tables {
		entries("L2", l2, h.Geometry().L2Entries(), h.Geometry().EntrySize())
	}
	entries("refcount table", h.RefcountOffset, h.RefcountLength<<h.ClusterBits/8, 8)
	for _, e := range c.table {
		if e != 0 {
			entries("refcounts", int64(e), 1<<h.ClusterBits/8, 8)
		}
	}
	snapshots, n, err := readSnapshots(f, h)
	if err != nil {
		t.Fatal(err)
	}
	if n > 0 {
		all = append(all, spot{"snapshot table", h.SnapshotsOffset, n})
	}
	for i := range snapshots {
		entries("snapshot L1", snapshots[i].L1Offset, int64(snapshots[i].L1Entries), 8)
	}
	bitmaps, err := Bitmaps(f, h)
	if err != nil {
		t.Fatal(err)
	}
	if bitmaps != nil {
		all = append(all, spot{"bitmap directory", h.Bitmaps.DirectoryOffset, h.Bitmaps.DirectorySize})
	}
	for i := range bitmaps {
		entries("bitmap table", bitmaps[i].TableOffset, bitmaps[i].TableEntries, 8)
	}
	slices.SortFunc(all, func(a, b spot) int { return int(a.off - b.off) })
	return all
}

// damage changes one or a few places of b, and says what it did.
func damage(rng *rand.Rand, b []byte, all []spot, cluster int64) string {
	kinds := map[string][]spot{}
	var names []string
	for _, s := range all {
		if kinds[s.what] == nil {
			names = append(names, s.what)
		}
		kinds[s.what] = append(kinds[s.what], s)
	}
	var did []string
	for range 1 + rng.IntN(3) {
		of := kinds[names[rng.IntN(len(names))]]
		s := of[rng.IntN(len(of))]
		at := s.off + rng.Int64N(max(s.n/8, 1))*8
		if at+8 > int64(len(b)) {
			continue
		}
		was := binary.BigEndian.Uint64(b[at:])
		is := was
		switch rng.IntN(9) {
		case 0:
			is ^= 1 << rng.IntN(64)
		case 1:
			is ^= 1 << (9 + rng.IntN(12)) // misaligned, or another cluster
		case 2:
			is ^= 1 << []int{0, 62, 63, 1, 32}[rng.IntN(5)]
		case 3:
			is = was&^entryOffset | uint64(rng.Int64N(int64(len(b))/cluster+3)*cluster)
		case 4:
			is = was + uint64(rng.Int64N(3)-1)
		case 5:
			is = was &^ entryOffset
		case 6:
			is = binary.BigEndian.Uint64(b[of[rng.IntN(len(of))].off:])
		case 7:
			is = was | 1 | uint64(rng.IntN(2))<<9
		case 8:
			is = rng.Uint64() >> rng.IntN(64)
		}
		binary.BigEndian.PutUint64(b[at:], is)
		did = append(did, fmt.Sprintf("%s at %#x: %#x becomes %#x", s.what, at, was, is))
	}
	return strings.Join(did, "; ")
}

// excused says why ours may differ from what qemu-img check says, "" if it may
// not.
func excused(d damagedImage, repair string, got, want verdict, says, qemuSays string) string {
	opened := !strings.Contains(qemuSays, "Could not open")
	is := func(text ...string) bool {
		for _, s := range text {
			if strings.Contains(says, s) || strings.Contains(qemuSays, s) {
				return true
			}
		}
		return false
	}
	switch {
	case !opened && is("extra data", "update bitmap directory"):
		return "QEMU opens no image with such bitmaps, which are right"
	case !opened && is("bitmap") && got.Total == 0:
		return "a disk of less than a sector has no bytes for QEMU"
	case !opened:
		return ""
	case want.Status == 1 || want.Status == -1:
		return "qemu-img cannot check it"
	case is("of the table at 0x0,"):
		return "the header is read as a table, and is not the same to both"
	case got.Status == 1 && is("bitmap ") && want.Status != 0:
		return "bitmaps that are not right"
	case got.Status == 1 && is("offset 0x0 is not the beginning", "backing file's name", "snapshot table's offset", "snapshots are too many"):
		return "header fields that QEMU looks at later"
	case repair != "" && d.autoclear:
		return "QEMU loses snapshots and bitmaps when it clears these bits"
	case got.Status == 2 && is("snapshot ", "snapshot table"):
		return "snapshots that cannot be found, and may be there"
	case got.Corruptions >= want.Corruptions && (is("no entry can in this image") || d.zeroFlag && got.Corruptions > maxFindings):
		return "entries that QEMU does not read, and finds nothing wrong with"
	case got.Status <= want.Status && is("named more often"):
		return "counted twice in 1 bit"
	case repair == "all" && got.Status == want.Status && got.Corruptions >= want.Corruptions && (strings.Contains(d.did, "L1 at") || strings.Contains(d.did, "header at 0x2")):
		return "flags in what may be the guest's bytes"
	case repair == "all" && got.Status == want.Status && got.Corruptions == want.Corruptions && is("Rebuilding", "outside image"):
		return "made anew in another way"
	}
	return ""
}

// damagedImage is an image with random damage.
type damagedImage struct {
	options   string
	seed      uint64
	did       string // to it
	b         []byte
	autoclear bool // the autoclear bits were changed
	zeroFlag  bool // its entries have no flag for zeros
}

// damager makes damaged images.
type damager struct {
	bases []damagedBase
}

type damagedBase struct {
	options string
	b       []byte
	spots   []spot
	cluster int64
}

func newDamager(t *testing.T) *damager {
	t.Helper()
	d := &damager{}
	for i, options := range []string{
		"cluster_size=512", "compat=0.10,cluster_size=1k", "cluster_size=4k", "cluster_size=16k,extended_l2=on",
		"cluster_size=1k,refcount_bits=1", "cluster_size=2k,refcount_bits=64", "cluster_size=64k",
	} {
		rng := rand.New(rand.NewPCG(5, 4))
		var f *memfile.File
		if strings.HasSuffix(options, "refcount_bits=1") {
			f = made(t, "600k", options) // which can have no snapshots
			shadowed(t, begun(t, f, Options{}), make([]byte, 600<<10), rng, 60)
		} else {
			f = manyFeatured(t, rng, options)
		}
		if i%2 == 0 {
			// Either snapshots or bitmaps: of an image with both qemu-img check -r
			// loses the snapshots.
			path := filepath.Join(t.TempDir(), "bitmaps.qcow2")
			if err := os.WriteFile(path, f.Bytes(), 0o600); err != nil {
				t.Fatal(err)
			}
			if !strings.HasSuffix(options, "refcount_bits=1") {
				qemuImg(t, "snapshot", "-d", "one", path)
			}
			qemuImg(t, "bitmap", "--add", "-g", "4k", path, "one")
			program(t, "qemu-io", "-f", "qcow2", "-c", "write 0 64k", path)
			f = loaded(t, path)
		}
		h, err := ReadHeader(f)
		if err != nil {
			t.Fatal(err)
		}
		d.bases = append(d.bases, damagedBase{options, f.Bytes(), spots(t, f), h.Geometry().ClusterSize()})
	}
	return d
}

func (d *damager) image(seed uint64) damagedImage {
	rng := rand.New(rand.NewPCG(seed, 5))
	base := d.bases[rng.IntN(len(d.bases))]
	bad := bytes.Clone(base.b)
	x := damagedImage{options: base.options, seed: seed, did: damage(rng, bad, base.spots, base.cluster), b: bad}
	x.autoclear = !bytes.Equal(bad[offAutoclear:offAutoclear+8], base.b[offAutoclear:offAutoclear+8])
	x.zeroFlag = strings.Contains(x.options, "0.10") || strings.Contains(x.options, "extended")
	return x
}

// TestCheckOfDamageAsQEMU damages metadata at random. Ours comes to what
// qemu-img check comes to, and after a repair of ours it agrees too.
// NBD_EXPORT_SOAK says how long it goes on.
func TestCheckOfDamageAsQEMU(t *testing.T) {
	images, end := uint64(16), time.Time{}
	if s := os.Getenv("NBD_EXPORT_SOAK"); s != "" {
		soak, err := time.ParseDuration(s)
		if err != nil {
			t.Fatalf("NBD_EXPORT_SOAK: %v", err)
		}
		images, end = 1<<62, time.Now().Add(soak)
	}
	d := newDamager(t)
	path := filepath.Join(t.TempDir(), "bad.qcow2")
	put := func(b []byte) {
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	compared, excuses := 0, map[string]int{}
	for seed := uint64(0); seed < images && (end.IsZero() || time.Now().Before(end)) && !t.Failed(); seed++ {
		x := d.image(seed)
		judge := func(what, repair string, got, want verdict, says, qemuSays string) {
			t.Helper()
			compared++
			if repair == "all" {
				got.EndOffset, want.EndOffset = 0, 0 // what is made anew is elsewhere
			}
			if got == want {
				return
			}
			why := excused(x, repair, got, want, says, qemuSays)
			excuses[why]++
			if why == "" {
				t.Errorf("%s, seed %d, %s: %s\nours %+v\nqemu %+v\n%.2000s\nqemu-img says %.2000s", x.options, seed, what, x.did, got, want, says, qemuSays)
			}
		}
		for _, repair := range []string{"", "leaks", "all"} {
			put(x.b)
			want, qemuSays := qemuVerdict(t, path, repair)
			f := memfile.New("bad", bytes.Clone(x.b))
			got, says := ourVerdict(f, repair)
			judge("check "+repair, repair, got, want, says, qemuSays)
			if repair == "" || got.Status == 1 {
				continue
			}
			sameDisk(t, x, memfile.New("bad", bytes.Clone(x.b)), f)
			put(f.Bytes())
			want, qemuSays = qemuVerdict(t, path, "")
			got.CorruptionsFixed, got.LeaksFixed = 0, 0
			judge("what is left after repair of "+repair, "", got, want, says, qemuSays)
		}
	}
	t.Logf("%d verdicts; may differ: %v", compared, excuses)
}

// sameDisk sees that what could be read of the disk before a repair reads the
// same.
func sameDisk(t *testing.T, x damagedImage, before, after *memfile.File) {
	t.Helper()
	const piece = 4096
	h, err := ReadHeader(before)
	if err != nil {
		t.Fatal(err)
	}
	o := Options{Warn: func(string) {}}
	was, err := New(before, h, o)
	if err != nil {
		return
	}
	is := opened(t, after, o)
	a, b := make([]byte, piece), make([]byte, piece)
	for off := int64(0); off <= min(h.Size, 1<<20)-piece; off += piece {
		if was.readAt(a, off) != nil {
			continue
		}
		if err := is.readAt(b, off); err != nil || !bytes.Equal(a, b) {
			t.Errorf("%s, seed %d: %s\nthe repair changes the disk at %d: %v", x.options, x.seed, x.did, off, err)
			return
		}
	}
}
