package backend

import (
	"errors"
	"testing"

	"golang.org/x/sys/unix"
)

// What changes an image as its owner has the locks meanwhile, and the record
// says so, then and afterwards.
func TestAsOwner(t *testing.T) {
	path := writeFile(t, t.TempDir(), pattern(10000, 1))
	record := func() *OwnerRecord {
		t.Helper()
		w, err := Who(path, "")
		must(t, err)
		return w.Owner
	}
	must(t, AsOwner(Options{Path: path}, func(f *File) error {
		if r := record(); r == nil || r.Clean || r.Epoch != 1 {
			t.Errorf("meanwhile the record says %+v", r)
		}
		if l := procLocks(t, path); len(l) == 0 {
			t.Error("no locks")
		}
		var le *LockError
		if err := AsOwner(Options{Path: path}, nil); !errors.As(err, &le) || le.Holder == "" {
			t.Errorf("a second one gets %v", err)
		}
		if _, err := OpenLink(path, "raw", ChainOptions{Lock: true}); !errors.As(err, &le) || le.Holder == "" {
			t.Errorf("who looks gets %v", err)
		}
		if err := f.Resize(5000); err != nil {
			return err
		}
		return f.WriteAt([]byte("changed"), 0, false)
	}))
	want := pattern(10000, 1)[:5000]
	copy(want, "changed")
	wantContent(t, path, want)
	if r := record(); r == nil || !r.Clean {
		t.Errorf("afterwards the record says %+v", r)
	}

	// A change that fails is let go in order too: what there is is durable.
	err := AsOwner(Options{Path: path}, func(*File) error { return unix.ENOSPC })
	wantErrno(t, err, unix.ENOSPC)
	if r := record(); !r.Clean || r.Epoch != 2 {
		t.Errorf("after a failure the record says %+v", r)
	}
	// Not so if nobody knows what is on the disk.
	err = AsOwner(Options{Path: path}, func(f *File) error { return &SyncError{f.Path(), unix.EIO} })
	wantErrno(t, err, unix.EIO)
	if r := record(); r.Clean || r.Epoch != 3 {
		t.Errorf("after a failed sync the record says %+v", r)
	}
	if all, _ := descriptors(t, path); all != 0 {
		t.Errorf("%d descriptors are left", all)
	}
}
