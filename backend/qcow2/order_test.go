package qcow2

import (
	"bytes"
	"path/filepath"
	"strings"
	"testing"

	"github.com/nbd-export/nbd-export/backend/qcow2/memfile"
)

// order says in which order an image's file was changed since the last call,
// by kind of cluster, as it is now.
func order(im *Image, f *memfile.File) string {
	_, events := f.Events()
	f.Record()
	var words []string
	for _, e := range events {
		word := ""
		switch e.Op {
		case memfile.Sync:
			word = "sync"
		case memfile.Resize:
			word = "resize"
		case memfile.Punch:
			word = "punch"
		default:
			word = where(im, e.Off)
		}
		if len(words) == 0 || words[len(words)-1] != word {
			words = append(words, word)
		}
	}
	return strings.Join(words, " ")
}

func where(im *Image, off int64) string {
	cluster := off &^ (im.g.ClusterSize() - 1)
	for _, e := range im.refs.table {
		if int64(e) == cluster {
			return "refcounts"
		}
	}
	for _, e := range im.l1 {
		if hostOffset(e) == cluster {
			return "L2"
		}
	}
	switch {
	case cluster == 0:
		return "header"
	case off >= im.h.L1Offset && off < im.h.L1Offset+8*int64(im.h.L1Entries):
		return "L1"
	case off >= im.refs.offset && off < im.refs.offset+8*int64(len(im.refs.table)):
		return "refcount table"
	}
	return "data"
}

// TestOrderOfFlush compares what is written with the steps of the package
// comment: what is on the left of a sync is in the file before what is on its
// right is begun.
func TestOrderOfFlush(t *testing.T) {
	f := made(t, "16M", "cluster_size=4k")
	im := begun(t, f, Options{})
	write := func(off int64) func() error {
		return func() error { return im.writeAt(bytes.Repeat([]byte{1}, 4096), off) }
	}
	f.Record()
	for _, step := range []struct {
		name string
		do   func() error
		want string
	}{
		// The new L2 table's cluster reads as zeros, past the former end.
		{"a write to a new table", write(0), "resize data"},
		{"its flush", im.Flush, "refcounts sync L2 sync L1 sync"},
		{"a write beside it", write(4096), "data"},
		{"its flush", im.Flush, "refcounts sync L2 sync"},
		{"an overwrite", write(4096), "data"},
		{"its flush", im.Flush, "sync"},
		// The file names the cluster until the second sync.
		{"a discard", func() error { return im.Discard(0, 4096) }, ""},
		{"its flush", im.Flush, "sync L2 sync punch"},
		{"the next flush", im.Flush, "refcounts sync"},
		{"nothing", im.Flush, "sync"},
		{"the freed cluster in use", write(8192), "data"},
		{"its flush", im.Flush, "refcounts sync L2 sync"},
		{"settling", im.Settle, "resize sync"},
		{"again", im.Settle, "sync"},
	} {
		if err := step.do(); err != nil {
			t.Fatal(err)
		}
		if got := order(im, f); got != step.want {
			t.Errorf("%s: %q, not %q", step.name, got, step.want)
		}
	}
	checked(t, f.Bytes(), true)
}

// TestOrderWithDataFile: the guest's bytes are durable before an entry names
// them also where they are in another file.
func TestOrderWithDataFile(t *testing.T) {
	dir := t.TempDir()
	path, dataPath := filepath.Join(dir, "d.qcow2"), filepath.Join(dir, "data")
	qemuImg(t, "create", "-q", "-f", "qcow2", "-o", "data_file="+dataPath, path, "1M")
	f, data := loaded(t, path), loaded(t, dataPath)
	im := begun(t, f, Options{Data: data})
	f.Record()
	synced := ""
	data.AfterSync = func() { synced += order(im, f) + " | " }
	if err := im.writeAt([]byte{1}, 0); err != nil {
		t.Fatal(err)
	}
	if err := im.Flush(); err != nil {
		t.Fatal(err)
	}
	if got, want := synced+order(im, f), "resize refcounts | sync L2 sync L1 sync"; got != want {
		t.Errorf("%q, not %q", got, want)
	}
}
