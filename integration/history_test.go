package integration

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"math"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/anishathalye/porcupine"
)

const sectorSize = 512

// fillSector makes a sector that says which write it is of, and where it
// belongs, in a way that no mixture of two does.
func fillSector(b []byte, sector int, id uint64) {
	for i := 0; i < sectorSize; i += 16 {
		binary.LittleEndian.PutUint64(b[i:], id)
		binary.LittleEndian.PutUint64(b[i+8:], uint64(sector)<<8|uint64(i/16))
	}
	binary.LittleEndian.PutUint32(b[sectorSize-4:], crc32.ChecksumIEEE(b[:sectorSize-4]))
}

// torn is the id of a sector that is the whole work of no write.
const torn = math.MaxUint64

// readSector returns the id of the write whose work a sector is, 0 if it was
// never written.
func readSector(b []byte, sector int) uint64 {
	var want [sectorSize]byte
	if string(b) == string(want[:]) {
		return 0
	}
	id := binary.LittleEndian.Uint64(b)
	fillSector(want[:], sector, id)
	if string(b) != string(want[:]) {
		return torn
	}
	return id
}

// outcome is what a client knows of its operation.
type outcome uint8

const (
	ok      outcome = iota
	refused         // it was told no: nothing must be there of it
	unknown         // the connection ended before the reply
)

// event is one operation on one sector as a client saw it.
type event struct {
	sector   int32
	read     bool
	outcome  outcome
	client   int16
	id       uint64 // written or read
	from, to int64  // nanoseconds since the start: sent, answered
}

func (e event) String() string {
	verb := "write"
	if e.read {
		verb = "read"
	}
	return fmt.Sprintf("%v..%v client %d %s %d: %s", time.Duration(e.from), time.Duration(e.to), e.client, verb, e.id,
		[]string{"ok", "refused", "unknown"}[e.outcome])
}

// input is an event as porcupine's model sees it.
type input struct {
	read bool
	id   uint64
}

// sectorModel is a register: a read gives what the last write put there.
func sectorModel(first uint64) porcupine.Model {
	return porcupine.Model{
		Init: func() any { return first },
		Step: func(state, in, out any) (bool, any) {
			i := in.(input)
			if i.read {
				return out.(uint64) == state.(uint64), state
			}
			return true, i.id
		},
	}
}

// checkSector says what is wrong with the history of one sector that first
// held the id first: "" if nothing is. Its events are sorted in place.
func checkSector(events []event, first uint64) string {
	slices.SortFunc(events, func(a, b event) int { return int(a.from - b.from) })
	written := map[uint64]outcome{first: ok}
	for _, e := range events {
		if !e.read {
			written[e.id] = e.outcome
		}
	}
	var ops []porcupine.Operation
	for _, e := range events {
		op := porcupine.Operation{ClientId: int(e.client), Input: input{e.read, e.id}, Output: e.id, Call: e.from, Return: e.to}
		switch {
		case e.read && e.id == torn:
			// Legal only while somebody writes; then it says nothing.
			if !slices.ContainsFunc(events, func(w event) bool {
				return !w.read && w.outcome != refused && w.from < e.to && (w.to > e.from || w.outcome == unknown)
			}) {
				return fmt.Sprintf("a read shows a mixture while nobody writes: %v", e)
			}
			continue
		case e.read:
			if o, is := written[e.id]; !is {
				return fmt.Sprintf("a read shows what nobody wrote: %v", e)
			} else if o == refused {
				return fmt.Sprintf("a refused write is there: %v", e)
			}
		case e.outcome == refused:
			continue // must not be there: nothing to model
		case e.outcome == unknown:
			op.Return = math.MaxInt64 // at any time from then on, or never
		}
		ops = append(ops, op)
	}
	switch r, _ := porcupine.CheckOperationsVerbose(sectorModel(first), ops, 30*time.Second); r {
	case porcupine.Ok:
		return ""
	case porcupine.Unknown:
		return "the history could not be judged in time"
	}
	return "no order of the acknowledged writes explains what was read: a write was lost, or two owners wrote"
}

// alternations counts how often, at least, acknowledged writes changed from one
// side to the other: each began only after the one before it was answered. side
// tells the side of an event's client. With one owner at a time there cannot be
// more of them than activations.
func alternations(events []event, side func(event) int) int {
	events = slices.DeleteFunc(slices.Clone(events), func(e event) bool { return e.read || e.outcome != ok })
	slices.SortFunc(events, func(a, b event) int { return int(a.to - b.to) })
	n, last, until := -1, -1, int64(-1)
	for _, e := range events {
		if e.from > until && side(e) != last {
			n, last, until = n+1, side(e), e.to
		}
	}
	return max(n, 0)
}

// explain renders the end of a sector's history.
func explain(events []event) string {
	var b strings.Builder
	if n := len(events); n > 30 {
		fmt.Fprintf(&b, "... %d earlier\n", n-30)
		events = events[n-30:]
	}
	for _, e := range events {
		fmt.Fprintln(&b, e)
	}
	return b.String()
}

// The judge itself is tested: what it must accept and what it must not.
func TestHistoryJudge(t *testing.T) {
	w := func(id uint64, o outcome, from, to int64) event { return event{id: id, outcome: o, from: from, to: to} }
	r := func(id uint64, from, to int64) event { return event{read: true, id: id, from: from, to: to} }
	for name, tt := range map[string]struct {
		events []event
		says   string
	}{
		"nothing":                         {nil, ""},
		"one after the other":             {[]event{w(1, ok, 0, 1), r(1, 2, 3), w(2, ok, 4, 5), r(2, 6, 7)}, ""},
		"nothing written":                 {[]event{r(9, 0, 1)}, ""},
		"two at once, one wins":           {[]event{w(1, ok, 0, 5), w(2, ok, 1, 4), r(1, 6, 7)}, ""},
		"two at once, the other wins":     {[]event{w(1, ok, 0, 5), w(2, ok, 1, 4), r(2, 6, 7)}, ""},
		"refused and absent":              {[]event{w(1, ok, 0, 1), w(2, refused, 2, 3), r(1, 4, 5)}, ""},
		"unknown and absent":              {[]event{w(1, ok, 0, 1), w(2, unknown, 2, 3), r(1, 4, 5)}, ""},
		"unknown and there, later":        {[]event{w(1, ok, 0, 1), w(2, unknown, 2, 3), r(1, 4, 5), r(2, 6, 7)}, ""},
		"a mixture while writing":         {[]event{w(1, ok, 0, 10), r(torn, 2, 3), r(1, 11, 12)}, ""},
		"lost":                            {[]event{w(1, ok, 0, 1), r(9, 2, 3)}, "lost"},
		"lost after another":              {[]event{w(1, ok, 0, 1), w(2, ok, 2, 3), r(1, 4, 5)}, "lost"},
		"lost by two owners":              {[]event{w(1, ok, 0, 5), w(2, ok, 0, 5), r(1, 6, 7), r(2, 8, 9)}, "lost"},
		"there and gone again":            {[]event{w(1, unknown, 0, 1), r(1, 2, 3), r(9, 4, 5)}, "lost"},
		"refused and there":               {[]event{w(1, refused, 0, 1), r(1, 2, 3)}, "refused"},
		"from nowhere":                    {[]event{r(7, 2, 3)}, "nobody wrote"},
		"a mixture while nobody writes":   {[]event{w(1, ok, 0, 1), r(torn, 2, 3)}, "mixture"},
		"a mixture while only refused":    {[]event{w(1, refused, 0, 9), r(torn, 2, 3)}, "mixture"},
		"read before it was sent":         {[]event{r(1, 0, 1), w(1, ok, 2, 3)}, "lost"},
		"unknown read before it was sent": {[]event{r(1, 0, 1), w(1, unknown, 2, 3)}, "lost"},
	} {
		got := checkSector(tt.events, 9)
		if tt.says == "" && got != "" || !strings.Contains(got, tt.says) {
			t.Errorf("%s: %q, want %q", name, got, tt.says)
		}
	}
	var both []event
	for i := range int64(10) {
		both = append(both, event{client: int16(i % 2), from: 10 * i, to: 10*i + 5}, // by turns
			event{client: int16(i%2) ^ 1, from: 10*i + 1, to: 10*i + 6, outcome: refused},
			event{client: int16(i%2) ^ 1, from: 0, to: 10*i + 7})
	}
	if n := alternations(both, func(e event) int { return int(e.client) }); n != 9 {
		t.Errorf("%d alternations, want 9", n)
	}
	a, b := make([]byte, sectorSize), make([]byte, sectorSize)
	if readSector(a, 5) != 0 {
		t.Error("an empty sector is not empty")
	}
	fillSector(a, 5, 77)
	fillSector(b, 5, 78)
	if readSector(a, 5) != 77 || readSector(a, 6) != torn {
		t.Error("a sector is not read as it was written")
	}
	copy(a[:256], b)
	if readSector(a, 5) != torn {
		t.Error("a mixture of two writes passes for one")
	}
}
