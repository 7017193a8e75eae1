package main

import (
	"fmt"
	"io"
	"slices"
	"strings"
	"time"
	"unicode/utf8"
)

// columnMax is the widest column of a table of several servers, in characters.
const columnMax = 60

// writeStatuses prints the servers side by side, a column for each, and an image
// that several of them have in one row.
func writeStatuses(w io.Writer, all []controlStatus, now time.Time) error {
	columns := make([][][]statusRow, len(all)) // by server, block, row
	blocks := 0
	for i, s := range all {
		head := []statusRow{{"control", s.Control}}
		if s.Status == nil {
			columns[i] = [][]statusRow{append(head, statusRow{"server", "does not answer"})}
		} else {
			columns[i] = statusBlocks(*s.Status, now)
			columns[i][0] = append(head, columns[i][0]...)
		}
	}
	alignImages(columns)
	for _, c := range columns {
		blocks = max(blocks, len(c))
	}
	width := make([]int, len(all))
	for i, c := range columns {
		for _, block := range c {
			for _, r := range block {
				width[i] = max(width[i], min(columnMax, utf8.RuneCountInString(r.value)))
			}
		}
	}
	var b strings.Builder
	for n := range blocks {
		if n > 0 {
			b.WriteByte('\n')
		}
		for _, name := range rowNames(columns, n) {
			line := fmt.Sprintf("%-12s", name)
			for i, c := range columns {
				value := ""
				if n < len(c) && c[n] != nil {
					value = valueOf(c[n], name)
				}
				line += " " + value + strings.Repeat(" ", max(0, width[i]-utf8.RuneCountInString(value))+1)
			}
			b.WriteString(strings.TrimRight(line, " ") + "\n")
		}
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// alignImages moves the blocks of images, all but the first of each column, so
// that those with the same path, or else node or export, stand in one row. Where
// a server has no such image its block is nil. Servers with one image each are
// left alone: whatever it is called, it is the one to be compared.
func alignImages(columns [][][]statusRow) {
	most := 0
	for _, c := range columns {
		most = max(most, len(c)-1)
	}
	if most < 2 {
		return
	}
	var rows [][][]statusRow // by row, column
	for i, c := range columns {
		left := slices.Clone(c[1:])
		for _, key := range []string{"image", "node", "export"} {
			left = slices.DeleteFunc(left, func(block []statusRow) bool {
				v := valueOf(block, key)
				n := slices.IndexFunc(rows, func(row [][]statusRow) bool {
					return v != "-" && row[i] == nil && slices.ContainsFunc(row, func(other []statusRow) bool { return valueOf(other, key) == v })
				})
				if n >= 0 {
					rows[n][i] = block
				}
				return n >= 0
			})
		}
		for _, block := range left {
			row := make([][]statusRow, len(columns))
			row[i] = block
			rows = append(rows, row)
		}
	}
	for i := range columns {
		columns[i] = columns[i][:1]
		for _, row := range rows {
			columns[i] = append(columns[i], row[i])
		}
	}
}

// rowNames are the names in block n of any column, in the order of the first
// that has most of them before it.
func rowNames(columns [][][]statusRow, n int) []string {
	var names []string
	for _, c := range columns {
		if n >= len(c) {
			continue
		}
		at := 0
		for _, r := range c[n] {
			found := false
			for i, name := range names {
				if name == r.name {
					at, found = i+1, true
				}
			}
			if !found {
				names = append(names[:at], append([]string{r.name}, names[at:]...)...)
				at++
			}
		}
	}
	return names
}

func valueOf(rows []statusRow, name string) string {
	for _, r := range rows {
		if r.name == name {
			return r.value
		}
	}
	return "-"
}
