package backend

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
)

// All names of a file lead to one record.
func TestRecordOfLink(t *testing.T) {
	dir := t.TempDir()
	path := writeFile(t, dir, make([]byte, 4096))
	must(t, os.Mkdir(filepath.Join(dir, "links"), 0o755))
	link := filepath.Join(dir, "links", "l")
	must(t, os.Symlink("../disk.img", link))
	a, b := openImage(t, Options{Path: path}, nil), openImage(t, Options{Path: link}, nil)
	must(t, activate(a, false))
	var le *LockError
	if err := activate(b, false); !errors.As(err, &le) || le.Holder == "" {
		t.Error(err)
	}
	must(t, inactivate(a))
	must(t, activate(b, false))
	wantRecord(t, path, 2, false)
	if left, _ := os.ReadDir(filepath.Dir(link)); len(left) != 1 || b.RecordPlace().Path != path+".owner" {
		t.Error(left, b.RecordPlace())
	}
}

func TestRecordPlaces(t *testing.T) {
	dir := t.TempDir()
	path := writeFile(t, dir, make([]byte, 4096))
	must(t, os.Mkdir(filepath.Join(dir, "records"), 0o755))
	own := filepath.Join(dir, "records", "r")
	for _, c := range []struct {
		name, want string
		o          Options
		warns      bool
	}{
		{"beside", path + ".owner", Options{}, false},
		{"path", own, Options{OwnerRecord: own}, false},
		{"off", "per process (--owner-record off)", Options{OwnerRecord: "off"}, false},
		{"read-only", "per process (a read-only export writes none)", Options{ReadOnly: true}, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			c.o.Path = path
			warned := 0
			c.o.Warn = func(string) { warned++ }
			r := openImage(t, c.o, nil)
			must(t, activate(r, false))
			must(t, r.Check())
			_, err := os.Lstat(c.want)
			if r.RecordPlace().String() != c.want || (err == nil) != (r.RecordPlace().Path != "") || (warned > 0) != c.warns {
				t.Errorf("%s, %v, %d warnings", r.RecordPlace(), err, warned)
			}
			must(t, inactivate(r))
			_ = os.Remove(c.want)
			_ = os.Remove(c.want + recordWas)
			if left, _ := os.ReadDir(dir); len(left) != 2 {
				t.Error(left)
			}
		})
	}
	if p := placeRecord("/dev/vda", "", true); p.String() != "per process (a block device needs --owner-record PATH)" {
		t.Error(p)
	}
	if p := placeRecord("/dev/vda", own, true); p.Path != own {
		t.Error(p)
	}
}
