package main

import (
	"go/parser"
	"go/token"
	"io/fs"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// arrows is who may import whom, as docs/architecture.md draws it. What is
// not listed imports none of ours.
var arrows = map[string][]string{
	"cmd/nbd-export": {"backend", "backend/qcow2", "bench", "control", "export", "internal/bytesize", "ioloop", "state"},
	"backend":        {"backend/qcow2"},
	"control":        {"backend", "export", "ioloop", "state"},
	"export":         {"backend", "export/wire", "ioloop", "state"},
	"ioloop":         {"backend", "internal/turns", "state"},
	"bench":          {"client", "internal/bytesize"},
	"bench/compare":  {"bench", "client", "control", "export/wire", "internal/bytesize"},
	"client":         {"export/wire", "internal/turns"},
}

// TestRooms holds the imports of non-test code against the arrows, so that a
// wall is moved on purpose or not at all.
func TestRooms(t *testing.T) {
	const module = "github.com/nbd-export/nbd-export/"
	root := filepath.Join("..", "..")
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && (d.Name() == "integration" || d.Name() == "testdata" || (d.Name() != "." && d.Name() != ".." && d.Name()[0] == '.')) {
			return fs.SkipDir
		}
		if !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
			return nil
		}
		dir, err := filepath.Rel(root, filepath.Dir(path))
		if err != nil {
			return err
		}
		file, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.ImportsOnly)
		if err != nil {
			return err
		}
		for _, imp := range file.Imports {
			name, _ := strconv.Unquote(imp.Path.Value)
			room, ours := strings.CutPrefix(name, module)
			if ours && !slices.Contains(arrows[dir], room) {
				t.Errorf("%s: %s must not import %s; see docs/architecture.md", path, dir, room)
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}
