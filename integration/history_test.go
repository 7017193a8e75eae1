package integration

import (
	"cmp"
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

// kind is what an operation does to a sector.
type kind uint8

const (
	write kind = iota // of the id; write zeroes is a write of the id 0
	read              // which found the id
	trim              // the sector is what it was, or zeroes
)

// outcome is what a client knows of its operation.
type outcome uint8

const (
	ok      outcome = iota
	refused         // it was told no: nothing must be there of it
	unknown         // the connection ended before the reply
)

// event is one operation on one sector as a client saw it.
type event struct {
	Sector   int32
	Kind     kind
	Outcome  outcome
	Client   int16
	Via      int16  // the process that was asked, as in ownership.Via
	ID       uint64 // written or read
	From, To int64  // nanoseconds since the start: sent, answered
	// MayTear: what is left of a write may be a mixture, if it was cut short.
	MayTear bool
}

// nobody is an event's Via for a look at the image past all exporters.
const nobody = -1

func (e event) String() string {
	return fmt.Sprintf("%v..%v client %d via %d %s %d: %s", time.Duration(e.From), time.Duration(e.To), e.Client, e.Via,
		[]string{"write", "read", "trim"}[e.Kind], int64(e.ID), []string{"ok", "refused", "unknown"}[e.Outcome])
}

// mayChange tells whether, for all that is known, an event changed its sector.
func (e event) mayChange() bool { return e.Kind != read && e.Outcome != refused }

// register is a sector as the judge models it: what it holds and who may write
// it.
type register struct {
	id    uint64
	owner int  // the ownership that was the last to begin, -1 before the first
	free  bool // and has ended
}

// input is an event, or the begin or the end of an ownership, as porcupine's
// model sees it.
type input struct {
	event
	begins, ends int // 1 + the ownership, 0 if it is an event
}

// sectorModel is a register that one exporter at a time owns. A read through
// the owner, or past all exporters, gives what the last write put there. Through
// others it may be stale, which is no matter of order. What is written, is
// written through the owner: an acknowledged write always, an unknown one
// perhaps, and then perhaps not as a whole. Without owners everybody is one.
func sectorModel(first uint64, owners []ownership) porcupine.Model {
	step := func(state, in, _ any) []any {
		s, i := state.(register), in.(input)
		owned := owners == nil || s.owner >= 0 && !s.free && owners[s.owner].is(i.Via)
		switch {
		case i.begins > 0:
			k := i.begins - 1
			if s.owner != k-1 || k > 0 && !s.free && !owners[k-1].Died {
				return nil
			}
			return []any{register{id: s.id, owner: k}}
		case i.ends > 0:
			if s.owner != i.ends-1 || s.free {
				return nil
			}
			return []any{register{id: s.id, owner: s.owner, free: true}}
		case i.Kind == read:
			if (owned || i.Via == nobody) && i.ID != s.id {
				return nil
			}
			return []any{s}
		case !owned && i.Outcome == ok:
			return nil
		}
		var next []any
		add := func(id uint64) { next = append(next, register{id, s.owner, s.free}) }
		if i.Outcome == unknown || i.Kind == trim {
			add(s.id)
		}
		if owned {
			add(i.ID)
		}
		if owned && i.MayTear {
			add(torn)
		}
		return next
	}
	m := porcupine.NondeterministicModel{
		Init: func() []any { return []any{register{id: first, owner: -1}} },
		Step: step,
	}
	return m.ToModel()
}

// checkSector says what is wrong with the history of one sector that first
// held the id first: "" if nothing is. Its events are sorted in place. owners
// are the ownerships of that time in their order; nil does not look at who was
// the owner.
func checkSector(events []event, first uint64, owners []ownership) string {
	slices.SortFunc(events, func(a, b event) int { return cmp.Compare(a.From, b.From) })
	var ops []porcupine.Operation
	add := func(in input, from, to int64) {
		ops = append(ops, porcupine.Operation{ClientId: int(in.Client), Input: in, Output: in.ID, Call: from, Return: to})
	}
	known := provenanceOf(events, first)
	for _, e := range events {
		to := e.To
		switch {
		case e.Kind == read:
			why, matters := known.check(e)
			if why != "" {
				return why
			}
			if !matters || owners != nil && e.Via != nobody && !overlaps(owners, e) {
				continue
			}
		case e.Outcome == refused:
			continue // must not be there: nothing to model
		case e.Outcome == unknown:
			if to = min(to, seenBy(e, events)); to < e.From {
				continue // whatever nobody saw need not have been
			}
		}
		add(input{event: e}, e.From, to)
	}
	for k, o := range owners {
		add(input{begins: k + 1}, o.Begin.From, o.Begin.To)
		if !o.Died {
			add(input{ends: k + 1}, o.End.From, o.End.To)
		}
	}
	switch r, _ := porcupine.CheckOperationsVerbose(sectorModel(first, owners), ops, judgeTimeout); r {
	case porcupine.Ok:
		return ""
	case porcupine.Unknown:
		return "the history could not be judged in time"
	}
	return "no order of the acknowledged writes explains what was read: a write was lost, or two owners wrote"
}

// judgeTimeout bounds what takes milliseconds.
const judgeTimeout = 2 * time.Minute

// seenBy returns until when an unknown write must be tried everywhere: what has
// an id of its own was there at the latest when it was first seen, of zeroes
// and mixtures it is not known whose they are. It is negative if nobody saw
// anything like it.
func seenBy(e event, events []event) int64 {
	first, last := int64(math.MaxInt64), int64(-1)
	for _, r := range events {
		if r.Kind != read || r.To < e.From {
			continue
		}
		if r.ID == e.ID {
			first = min(first, r.To)
		}
		if r.ID == e.ID && e.ID == 0 || r.ID == torn && e.MayTear {
			last = max(last, r.To)
		}
	}
	if last < 0 && first < math.MaxInt64 {
		return first
	}
	return last
}

// provenance is what can be known of ids whatever the order of events.
type provenance struct {
	events  []event
	first   uint64
	since   map[uint64]int64 // when an id may have been there at the earliest
	refused map[uint64]bool
	tears   int64 // since when a mixture may be left of a write, MaxInt64 for never
}

func provenanceOf(events []event, first uint64) *provenance {
	p := &provenance{events, first, map[uint64]int64{first: math.MinInt64}, map[uint64]bool{}, math.MaxInt64}
	for _, e := range events {
		switch since, is := p.since[e.ID]; {
		case e.Kind == read:
		case e.Outcome == refused:
			p.refused[e.ID] = true
		default:
			if !is || e.From < since {
				p.since[e.ID] = e.From
			}
			if e.MayTear {
				p.tears = min(p.tears, e.From)
			}
		}
	}
	return p
}

// check says what is wrong with a read, and whether it says anything about the
// order of events.
func (p *provenance) check(r event) (why string, matters bool) {
	since, is := p.since[r.ID]
	switch {
	case r.ID == torn && slices.ContainsFunc(p.events, func(w event) bool { return w.mayChange() && w.From <= r.To && w.To >= r.From }):
		return "", false // legal while somebody writes; then it says nothing
	case is && since <= r.To, r.ID == torn && p.tears <= r.To:
		return "", true
	case r.ID == torn:
		return fmt.Sprintf("a read shows a mixture while nobody writes: %v", r), true
	case p.refused[r.ID]:
		return fmt.Sprintf("a refused write is there: %v", r), true
	}
	return fmt.Sprintf("a read shows what nobody wrote: %v", r), true
}

// alternations counts how often, at least, acknowledged writes changed from one
// side to the other: each began only after the one before it was answered. side
// tells the side of an event's client. With one owner at a time there cannot be
// more of them than activations.
func alternations(events []event, side func(event) int) int {
	events = slices.DeleteFunc(slices.Clone(events), func(e event) bool { return e.Kind == read || e.Outcome != ok })
	slices.SortFunc(events, func(a, b event) int { return cmp.Compare(a.To, b.To) })
	n, last, until := -1, -1, int64(-1)
	for _, e := range events {
		if e.From > until && side(e) != last {
			n, last, until = n+1, side(e), e.To
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
	w := func(id uint64, o outcome, from, to int64) event {
		e := event{ID: id, Outcome: o, From: from, To: to}
		if o == unknown {
			e.To = math.MaxInt64
		}
		return e
	}
	r := func(id uint64, from, to int64) event { return event{Kind: read, ID: id, From: from, To: to} }
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
		"read before it was sent":         {[]event{r(1, 0, 1), w(1, ok, 2, 3)}, "nobody wrote"},
		"unknown read before it was sent": {[]event{r(1, 0, 1), w(1, unknown, 2, 3)}, "nobody wrote"},
	} {
		got := checkSector(tt.events, 9, nil)
		if tt.says == "" && got != "" || !strings.Contains(got, tt.says) {
			t.Errorf("%s: %q, want %q", name, got, tt.says)
		}
	}
	var both []event
	for i := range int64(10) {
		both = append(both, event{Client: int16(i % 2), From: 10 * i, To: 10*i + 5}, // by turns
			event{Client: int16(i%2) ^ 1, From: 10*i + 1, To: 10*i + 6, Outcome: refused},
			event{Client: int16(i%2) ^ 1, From: 0, To: 10*i + 7})
	}
	if n := alternations(both, func(e event) int { return int(e.Client) }); n != 9 {
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
