package backend

import (
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// What was just written is dated by the clock, so that what the next owner writes at
// once has another date; on kernels that date by their tick TestTwoOwners needs it.
func TestStamp(t *testing.T) {
	onEach(t, func(t *testing.T, dir string) {
		path := writeFile(t, dir, make([]byte, 5000))
		date := func(at time.Time) {
			t.Helper()
			ts := unix.NsecToTimespec(at.UnixNano())
			must(t, unix.UtimesNanoAt(unix.AT_FDCWD, path, []unix.Timespec{ts, ts}, 0))
		}
		mtime := func() time.Time {
			st := statOf(t, path)
			return time.Unix(st.Mtim.Unix())
		}
		r := openImage(t, Options{Path: path}, nil)
		must(t, activate(r, false))
		must(t, write(r, 0, []byte("mine"), false))
		for {
			at := time.Now().Truncate(4 * time.Millisecond)
			date(at)
			r.cur.Load().stamp()
			if m := mtime(); m.After(at) && !m.After(time.Now()) {
				break
			}
			if age := time.Since(at); age < tick { // else this was too slow for it
				t.Fatalf("written %v ago, and dated by the tick", age)
			}
		}
		old := time.Now().Add(-time.Hour).Truncate(time.Second)
		date(old)
		must(t, inactivate(r))
		if m := mtime(); !m.Equal(old) {
			t.Errorf("written at %v, dated %v", old, m)
		}

		// Who wrote nothing dates nothing.
		must(t, activate(r, true))
		at := time.Now()
		date(at)
		must(t, inactivate(r))
		if m := mtime(); !m.Equal(at) {
			t.Errorf("not written, but dated %v, was %v", m, at)
		}
	})
}

// So are the files of a qcow2 image that its owner writes: only what is said to be written
// is dated.
func TestStampQcow(t *testing.T) {
	for name, change := range map[string]func(r *Owned) error{
		"write":   func(r *Owned) error { return write(r, 0, []byte("mine"), false) },
		"discard": func(r *Owned) error { return r.Discard(0, 64<<10) },
		"zero":    func(r *Owned) error { return r.Zero(0, 64<<10, 0) },
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			base := writeFile(t, dir, make([]byte, 1<<20))
			data := filepath.Join(dir, "data")
			path := makeQcow(t, dir, "-o", "data_file="+data, "-b", base, "-F", "raw", "1M")
			r := openImage(t, Options{Path: path, Format: "qcow2"}, nil)
			must(t, activate(r, false))
			must(t, inactivate(r)) // made whole
			must(t, activate(r, false))
			want := map[string]bool{path: true, data: true, base: false}
			v := r.cur.Load()
			dirty := func(f *File) bool { return f.dirt.Load() == dirtWritten }
			must(t, v.files(func(f *File) error {
				if dirty(f) {
					t.Errorf("%s is said to be written", f.path)
				}
				return nil
			}))
			must(t, change(r))
			must(t, v.files(func(f *File) error {
				if dirty(f) != want[f.path] {
					t.Errorf("%s is said to be written: %v", f.path, dirty(f))
				}
				return nil
			}))
			must(t, inactivate(r))
		})
	}
}
