package backend

import (
	"errors"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/nbd-export/nbd-export/internal/testfs"
)

func TestIdentify(t *testing.T) {
	onEach(t, func(t *testing.T, dir string) {
		path := writeFile(t, dir, make([]byte, 8192))
		a, b := openImage(t, Options{Path: path}, nil), openImage(t, Options{Path: path}, nil)
		must(t, activate(a, false))
		before := statOf(t, path)

		if noted, err := b.Note("x"); noted || err != nil {
			t.Errorf("an inactive exporter notes: %v, %v", noted, err)
		}
		if noted, err := a.Note("n1/image0"); !noted || err != nil {
			t.Fatal(noted, err)
		}
		ia, ib := a.Identify(), b.Identify()
		for _, i := range []Identity{ia, ib} {
			if i.Nonce != "n1/image0" || i.Epoch != 1 || i.Size != 8192 || i.OpenErr != nil || i.RecordErr != nil || i.Lags ||
				i.BootID == "" || i.Ino != before.Ino || i.Dev != before.Dev || i.Record.Path != path+".owner" {
				t.Errorf("%+v", i)
			}
		}
		if !ia.Since.Equal(ib.Since) {
			t.Error("two dates of one record")
		}
		// It fences nobody, and stays until the next owner.
		must(t, a.Check())
		must(t, inactivate(a))
		wantRecord(t, path, 1, true)
		if i := b.Identify(); i.Nonce != "n1/image0" {
			t.Errorf("the nonce went with the owner: %+v", i)
		}
		must(t, activate(b, true))
		if i := a.Identify(); i.Nonce != "" || i.Epoch != 2 {
			t.Errorf("the next owner's record: %+v", i)
		}
		after := statOf(t, path)
		if before.Mtim != after.Mtim || before.Ctim != after.Ctim || before.Blocks != after.Blocks {
			t.Error("the image was changed")
		}
		noTemp(t, path)
	})
}

func TestIdentifyTellsWhatIsWrong(t *testing.T) {
	path := writeFile(t, testfs.Memory(t), make([]byte, 4096))
	open := &failing{}
	a := openImage(t, Options{Path: path}, open.hook)
	open.set(opOpen, unix.EROFS)
	if i := a.Identify(); !errors.Is(i.OpenErr, unix.EROFS) || i.Size != 4096 {
		t.Errorf("%+v", i)
	}
	open.set(opOpen, nil)
	must(t, os.WriteFile(path+".owner", []byte("no record"), 0o600))
	if i := a.Identify(); i.RecordErr == nil || i.Nonce != "" {
		t.Errorf("%+v", i)
	}
	must(t, os.Remove(path+".owner"))
	must(t, os.Truncate(path, 8192))
	if i := a.Identify(); i.Size != 8192 || i.OpenErr != nil {
		t.Errorf("%+v", i)
	}
	must(t, os.Rename(path, path+"2"))
	if i := a.Identify(); !errors.Is(i.OpenErr, unix.ENOENT) {
		t.Errorf("%+v", i)
	}
	must(t, os.WriteFile(path, nil, 0o600))
	if i := a.Identify(); !errors.Is(i.OpenErr, unix.ESTALE) {
		t.Errorf("%+v", i)
	}
}

// What could not be written is told without a descriptor that could write.
func TestIdentifyOnReadOnlyFileSystem(t *testing.T) {
	dir := smallFS(t)
	a := openImage(t, Options{Path: writeFile(t, dir, make([]byte, 4096))}, nil)
	if i := a.Identify(); i.OpenErr != nil {
		t.Error(i.OpenErr)
	}
	must(t, unix.Mount("none", dir, "tmpfs", unix.MS_REMOUNT|unix.MS_RDONLY, ""))
	i := a.Identify()
	wantErrno(t, i.OpenErr, unix.EROFS)
	if !strings.Contains(i.OpenErr.Error(), "--read-only") {
		t.Error(i.OpenErr)
	}
}

func TestNoteOnlyByTheOwner(t *testing.T) {
	dir := testfs.Memory(t)
	path := writeFile(t, dir, make([]byte, 4096))
	disk := &failing{}
	a := openImage(t, Options{Path: path}, disk.hook)
	must(t, activate(a, false))
	disk.set(opRecordRename, unix.EDQUOT)
	disk.set(opRecordOverwrite, unix.EDQUOT)
	if noted, err := a.Note("n"); noted || !isErrno(err, unix.EDQUOT) || !strings.Contains(err.Error(), path+".owner") {
		t.Error(noted, err)
	}
	disk.set(opRecordRename, nil)
	disk.set(opRecordOverwrite, nil)
	if i := a.Identify(); i.Nonce != "" || i.Epoch != 1 {
		t.Errorf("%+v", i)
	}
	takeOver(t, path, func(r *OwnerRecord) { r.Epoch = 9 })
	noted, err := a.Note("n")
	if noted {
		t.Error("noted in another's record")
	}
	wantFenced(t, err)

	off := openImage(t, Options{Path: writeFile(t, testfs.Memory(t), make([]byte, 4096)), OwnerRecord: OwnerRecordOff}, nil)
	must(t, activate(off, false))
	if noted, err := off.Note("n"); noted || err != nil {
		t.Error(noted, err)
	}
	if i := off.Identify(); i.Record.Path != "" || i.Nonce != "" || i.Ino == 0 {
		t.Errorf("%+v", i)
	}
}
