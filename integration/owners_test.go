package integration

import (
	"cmp"
	"encoding/json"
	"fmt"
	"math"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// span is when something happened: not before From, not after To.
type span struct{ From, To int64 }

// ownership is one process's time as the owner of the image.
type ownership struct {
	Epoch      uint64
	Via        int16 // the process: its place in recording.Lives, or somebody
	Begin, End span
	Died       bool // it ended by the death of the process, when the next one began at the latest
}

// somebody is the Via of an ownership of which only the next owner knew.
const somebody = -2

func (o ownership) is(via int16) bool { return o.Via == via || o.Via == somebody }

func (o ownership) String() string {
	d := func(n int64) time.Duration { return time.Duration(n).Round(time.Microsecond) }
	return fmt.Sprintf("epoch %d via %d, from %v..%v to %v..%v, died: %v",
		o.Epoch, o.Via, d(o.Begin.From), d(o.Begin.To), d(o.End.From), d(o.End.To), o.Died)
}

// overlaps tells whether an event may have met its process as the owner.
func overlaps(owners []ownership, e event) bool {
	return slices.ContainsFunc(owners, func(o ownership) bool {
		return o.is(e.Via) && o.Begin.From <= e.To && o.End.To >= e.From
	})
}

// sighting is what was heard of a process: the answer to a question asked at
// From, or a line of its log (Line), read at To.
type sighting struct {
	From, To int64
	State    string
	Step     string // of the transition under way
	Epoch    uint64
	Line     bool
}

// letsGo: the locks are going, or gone, and another may have the image before
// this one has come to say that it is inactive.
func (s sighting) letsGo() bool {
	return s.Step == "release" || s.Step == "abandon" || s.Step == "stop"
}

func (s sighting) owns() bool {
	return s.State == "active" || s.State == "inactivating" || s.State == "failed(io)"
}

// lifetime is one exporter process as the test knew it.
type lifetime struct {
	Site    int
	PID     int
	Started int64
	Killed  bool
	Seen    []sighting
}

// recording is everything that is known of a round; its JSON is kept when the
// judge finds fault.
type recording struct {
	Seed   uint64
	Round  int
	First  []uint64 // what each sector held before
	End    int64    // when the image was read
	Last   []uint64 // and what it held then
	Lives  []lifetime
	Left   []dirtyOwner // who did not let go in order
	Events []event
	// Granted are orders by which Via, so it was said, was active between From and
	// To.
	Granted []event
}

// dirtyOwner is an owner that the next one, or the owner record, told of.
type dirtyOwner struct {
	PID   int
	Epoch uint64
}

var dirtyLine = regexp.MustCompile(`did not let go in order: .* pid (\d+),.* epoch (\d+)`)

// logged adds what a line of a process's JSON log tells.
func (r *recording) logged(via int, line string, at int64) {
	var l struct {
		Msg, From, To string
		Epoch         uint64
	}
	if json.Unmarshal([]byte(line), &l) != nil {
		return
	}
	if m := dirtyLine.FindStringSubmatch(l.Msg); m != nil {
		pid, _ := strconv.Atoi(m[1])
		epoch, _ := strconv.ParseUint(m[2], 10, 64)
		r.Left = append(r.Left, dirtyOwner{pid, epoch})
	}
	if l.To != "" {
		r.Lives[via].Seen = append(r.Lives[via].Seen, sighting{To: at, State: l.To, Epoch: l.Epoch, Line: true})
	}
}

// owners puts together who owned the image when, in the order of epochs, and
// says what is wrong with that. Only what processes said counts, by the test's
// own clock: when something was asked and when the answer was there.
func (r *recording) owners() (owners []ownership, wrong []string) {
	for via, l := range r.Lives {
		epochs := map[uint64]bool{}
		for _, s := range l.Seen {
			if s.owns() && !epochs[s.Epoch] {
				epochs[s.Epoch] = true
				owners = append(owners, l.ownership(int16(via), s.Epoch))
			}
		}
	}
	for _, d := range r.Left {
		via := slices.IndexFunc(r.Lives, func(l lifetime) bool { return l.PID == d.PID })
		known := slices.ContainsFunc(owners, func(o ownership) bool { return o.Epoch == d.Epoch })
		if via >= 0 && !known {
			l := r.Lives[via]
			owners = append(owners, ownership{Epoch: d.Epoch, Via: int16(via), Died: true,
				Begin: span{l.Started, math.MaxInt64}, End: span{l.Started, math.MaxInt64}})
		}
	}
	slices.SortFunc(owners, func(a, b ownership) int {
		return cmp.Or(cmp.Compare(a.Epoch, b.Epoch), cmp.Compare(a.Begin.To, b.Begin.To))
	})
	for i := 1; i < len(owners); i++ {
		if a, b := owners[i-1], owners[i]; b.Epoch > a.Epoch+1 {
			// Owners that were killed before they could say a word, one after the other.
			gap := ownership{Epoch: a.Epoch + 1, Via: somebody, Died: true,
				Begin: span{a.Begin.From, math.MaxInt64}, End: span{a.Begin.From, math.MaxInt64}}
			owners = slices.Insert(owners, i, gap)
		}
	}
	last := 0 // of those before, the one that was seen to own it last
	for i := 1; i < len(owners); i++ {
		a, b, l := &owners[i-1], &owners[i], owners[last]
		if a.Epoch == b.Epoch {
			wrong = append(wrong, fmt.Sprintf("one epoch has two owners: %v; %v", a, b))
		} else if a.Begin.From > b.Begin.To {
			wrong = append(wrong, fmt.Sprintf("epochs are not in the order of their owners: %v; %v", a, b))
		}
		if l.End.From > b.Begin.To {
			wrong = append(wrong, fmt.Sprintf("two owners at once: %v; %v", l, b))
		}
		if b.End.From > l.End.From {
			last = i
		}
		b.Begin.From = max(b.Begin.From, min(a.Begin.From, b.Begin.To))
	}
	until := int64(math.MaxInt64)
	if r.End > 0 {
		until = r.End
	}
	for i := len(owners) - 1; i >= 0; i-- {
		o := &owners[i]
		// What is known of the next one bounds what is not known of this one.
		o.End.To = max(min(o.End.To, until), o.End.From)
		o.Begin.To = max(min(o.Begin.To, o.End.To), o.Begin.From)
		until = o.Begin.To
	}
	return owners, wrong
}

// ownership is what a process's own words say of one epoch.
func (l *lifetime) ownership(via int16, epoch uint64) ownership {
	o := ownership{Epoch: epoch, Via: via, Died: true,
		Begin: span{l.Started, math.MaxInt64}, End: span{l.Started, math.MaxInt64}}
	for _, s := range l.Seen {
		switch {
		case s.Epoch < epoch: // not yet
			o.Begin.From = max(o.Begin.From, s.From)
		case s.Epoch == epoch && s.owns():
			o.Begin.To = min(o.Begin.To, s.To)
			if !s.letsGo() {
				o.End.From = max(o.End.From, s.From)
			}
		default: // no more
			o.Begin.To = min(o.Begin.To, s.To)
			o.End.To = min(o.End.To, s.To)
			o.Died = false
		}
	}
	o.End.From = max(o.End.From, o.Begin.From)
	return o
}

// judge says what is wrong with a round.
func (r *recording) judge() []string {
	owners, wrong := r.owners()
	for i, o := range owners {
		if o.Died && o.Via >= 0 && !r.Lives[o.Via].Killed {
			wrong = append(wrong, fmt.Sprintf("nobody killed this owner, and it did not say that it let go: %v", o))
		}
		if i+1 < len(owners) && o.Via == somebody {
			wrong = append(wrong, unlessKilled(r.Lives, o)...)
		}
	}
	for _, g := range r.Granted {
		if !overlaps(owners, g) {
			wrong = append(wrong, fmt.Sprintf("process %d is said to have become active at %v..%v, but was not the owner then", g.Via, time.Duration(g.From), time.Duration(g.To)))
		}
	}
	bySector := make([][]event, len(r.First))
	for _, e := range r.Events {
		if e.Outcome == unknown {
			// It can come as long as its process owns the image.
			e.To = e.From
			for _, o := range owners {
				if o.is(e.Via) {
					e.To = max(e.To, o.End.To)
				}
			}
			e.MayTear = r.Lives[e.Via].Killed && e.Kind != read
		}
		bySector[e.Sector] = append(bySector[e.Sector], e)
	}
	verdicts := make([]string, len(r.First))
	inParallel(len(r.First), func(i int) {
		events := append(bySector[i], event{Sector: int32(i), Kind: read, ID: r.Last[i], From: r.End, To: r.End + 1, Client: nobody, Via: nobody})
		if why := checkSector(events, r.First[i], owners); why != "" {
			verdicts[i] = fmt.Sprintf("sector %d, which held %d: %s\n%s", i, int64(r.First[i]), why, explain(events))
		}
	})
	return append(wrong, slices.DeleteFunc(verdicts, func(s string) bool { return s == "" })...)
}

// inParallel calls f for 0 to n-1 on all processors.
func inParallel(n int, f func(int)) {
	var next atomic.Int64
	var wg sync.WaitGroup
	for range runtime.GOMAXPROCS(0) {
		wg.Go(func() {
			for i := next.Add(1) - 1; i < int64(n); i = next.Add(1) - 1 {
				f(int(i))
			}
		})
	}
	wg.Wait()
}

// unlessKilled complains of an owner without a name where nobody was killed.
func unlessKilled(lives []lifetime, o ownership) []string {
	if slices.ContainsFunc(lives, func(l lifetime) bool { return l.Killed }) {
		return nil
	}
	return []string{"an epoch is missing, and nobody was killed: " + o.String()}
}

// explainOwners renders ownerships.
func explainOwners(owners []ownership) string {
	var b strings.Builder
	for _, o := range owners {
		fmt.Fprintln(&b, o)
	}
	return b.String()
}

// What the judge must find with owners in view, and what it must not.
func TestHistoryJudgeOfOwners(t *testing.T) {
	// Epoch 1 is process 0's until 100, epoch 2 process 1's until it is killed at
	// 200, epoch 3 process 0's again, epoch 4 process 2's. Each change takes 10.
	lives := []lifetime{
		{PID: 10, Seen: []sighting{
			{From: 2, To: 10, State: "active", Epoch: 1}, {From: 90, To: 95, State: "active", Epoch: 1},
			{To: 105, State: "inactive", Epoch: 1, Line: true}, {From: 106, To: 107, State: "inactive", Epoch: 1},
			{From: 200, To: 202, State: "inactive", Epoch: 1}, {To: 210, State: "active", Epoch: 3, Line: true},
			{From: 290, To: 295, State: "active", Epoch: 3}, {To: 305, State: "inactive", Epoch: 3, Line: true},
		}},
		{PID: 11, Killed: true, Seen: []sighting{
			{From: 100, To: 101, State: "inactive"}, {To: 110, State: "active", Epoch: 2, Line: true},
			{From: 190, To: 195, State: "active", Epoch: 2},
		}},
		{PID: 12, Started: 250, Seen: []sighting{
			{From: 295, To: 299, State: "inactive"}, {To: 310, State: "active", Epoch: 4, Line: true},
			{From: 390, To: 391, State: "active", Epoch: 4}, {To: 400, State: "closed", Epoch: 4, Line: true},
		}},
	}
	w := func(via int16, id uint64, o outcome, from, to int64) event {
		return event{Via: via, ID: id, Outcome: o, From: from, To: to}
	}
	tr := func(via int16, from, to int64) event { return event{Via: via, Kind: trim, From: from, To: to} }
	r := func(via int16, id uint64, from, to int64) event {
		return event{Via: via, Kind: read, ID: id, From: from, To: to}
	}
	lost := "no order of the acknowledged writes"
	for name, tt := range map[string]struct {
		events []event
		last   uint64
		says   string
	}{
		"nothing":                              {nil, 9, ""},
		"each at its time":                     {[]event{w(0, 1, ok, 50, 51), w(1, 2, ok, 150, 151), w(0, 3, ok, 250, 251), w(2, 4, ok, 350, 351)}, 4, ""},
		"held until activation":                {[]event{w(1, 1, ok, 50, 150)}, 1, ""},
		"held, before the owner's":             {[]event{w(1, 1, ok, 50, 150), w(0, 2, ok, 60, 61)}, 1, ""},
		"held, and there too early":            {[]event{w(1, 1, ok, 50, 150), w(0, 2, ok, 60, 61)}, 2, lost},
		"acknowledged by no owner":             {[]event{w(1, 1, ok, 50, 51)}, 1, lost},
		"acknowledged by a dead one":           {[]event{w(1, 1, ok, 250, 251)}, 1, lost},
		"acknowledged by the one before":       {[]event{w(0, 1, ok, 150, 151)}, 1, lost},
		"zeroes by no owner":                   {[]event{w(1, 0, ok, 50, 51)}, 0, lost},
		"zeroes by the owner":                  {[]event{w(0, 0, ok, 50, 51)}, 0, ""},
		"trimmed to nothing":                   {[]event{tr(0, 50, 51)}, 0, ""},
		"trimmed and kept":                     {[]event{tr(0, 50, 51)}, 9, ""},
		"trimmed to something":                 {[]event{w(0, 1, ok, 40, 41), w(0, 2, ok, 42, 43), tr(0, 50, 51)}, 1, lost},
		"trimmed by no owner":                  {[]event{tr(1, 50, 51)}, 9, lost},
		"refused trim":                         {[]event{{Via: 1, Kind: trim, Outcome: refused, From: 50, To: 51}}, 0, "refused"},
		"stale through another":                {[]event{w(0, 1, ok, 50, 51), r(1, 9, 60, 61)}, 1, ""},
		"stale through the owner":              {[]event{w(0, 1, ok, 50, 51), r(0, 9, 60, 61)}, 1, lost},
		"stale after activation":               {[]event{w(0, 1, ok, 50, 51), r(1, 9, 150, 151)}, 1, lost},
		"stale while it is activated":          {[]event{w(0, 1, ok, 50, 51), r(1, 9, 105, 151)}, 1, ""},
		"from the future through another":      {[]event{r(1, 1, 50, 51), w(0, 1, ok, 60, 61)}, 1, "nobody wrote"},
		"from nowhere through another":         {[]event{r(1, 7, 50, 51)}, 9, "nobody wrote"},
		"in flight at a death, there":          {[]event{w(1, 1, unknown, 199, math.MaxInt64)}, 1, ""},
		"in flight at a death, absent":         {[]event{w(1, 1, unknown, 199, math.MaxInt64)}, 9, ""},
		"in flight at a death, torn":           {[]event{w(1, 1, unknown, 199, math.MaxInt64)}, torn, ""},
		"torn, seen so, written again":         {[]event{w(1, 1, unknown, 199, math.MaxInt64), r(0, torn, 240, 241), w(0, 2, ok, 250, 251)}, 2, ""},
		"torn, then whole":                     {[]event{w(1, 1, unknown, 199, math.MaxInt64), r(0, torn, 240, 241), r(0, 1, 250, 251)}, 1, lost},
		"torn after it was written again":      {[]event{w(1, 1, unknown, 199, math.MaxInt64), w(0, 2, ok, 250, 251)}, torn, lost},
		"written again, then there":            {[]event{w(1, 1, unknown, 199, math.MaxInt64), w(0, 2, ok, 250, 251)}, 1, lost},
		"late: seen absent by the next, there": {[]event{w(1, 1, unknown, 199, math.MaxInt64), r(0, 9, 240, 241)}, 1, lost},
		"late zeroes":                          {[]event{w(1, 0, unknown, 199, math.MaxInt64), r(0, 9, 240, 241)}, 0, lost},
		"unknown, the client died":             {[]event{w(0, 1, unknown, 50, math.MaxInt64), r(1, 9, 150, 151), r(0, 1, 250, 251)}, 1, ""}, // in its second time
		"unknown, sent to no owner any more":   {[]event{w(1, 1, unknown, 250, math.MaxInt64)}, 1, lost},
		"unknown and torn, but it lived":       {[]event{w(0, 1, unknown, 50, math.MaxInt64)}, torn, "mixture"},
		"torn by nobody":                       {[]event{w(0, 1, ok, 50, 51)}, torn, "mixture"},
		"refused and there":                    {[]event{w(0, 1, refused, 50, 51)}, 1, "refused"},
	} {
		rec := &recording{First: []uint64{9}, Last: []uint64{tt.last}, End: 500, Lives: lives, Events: tt.events}
		got := strings.Join(rec.judge(), "\n")
		if tt.says == "" && got != "" || !strings.Contains(got, tt.says) {
			t.Errorf("%s: %q, want %q", name, got, tt.says)
		}
	}

	alter := func(via int, s ...sighting) []lifetime {
		altered := slices.Clone(lives)
		altered[via].Seen = append(slices.Clone(altered[via].Seen), s...)
		return altered
	}
	for name, tt := range map[string]struct {
		lives []lifetime
		says  string
	}{
		"as it was":                {lives, ""},
		"the old one goes on":      {alter(1, sighting{From: 220, To: 221, State: "active", Epoch: 2}), "two owners at once"},
		"the old one settles":      {alter(0, sighting{From: 115, To: 116, State: "inactivating", Step: "settle", Epoch: 1}), "two owners at once"},
		"the old one is late":      {alter(0, sighting{From: 115, To: 116, State: "inactivating", Step: "release", Epoch: 1}), ""},
		"one epoch, two owners":    {alter(2, sighting{From: 350, To: 351, State: "active", Epoch: 3}), "one epoch has two owners"},
		"a higher epoch before":    {alter(2, sighting{To: 50, State: "active", Epoch: 4}, sighting{From: 255, To: 256, State: "inactive"}), "two owners at once"},
		"one that was never ended": {append(slices.Clone(lives), lifetime{Started: 410, Seen: []sighting{{To: 450, State: "active", Epoch: 5, Line: true}}}), "nobody killed this owner"},
	} {
		rec := &recording{First: []uint64{9}, Last: []uint64{9}, End: 500, Lives: tt.lives}
		got := strings.Join(rec.judge(), "\n")
		if tt.says == "" && got != "" || !strings.Contains(got, tt.says) {
			t.Errorf("%s: %q, want %q", name, got, tt.says)
		}
	}

	// An owner that died without a word is known by what it left.
	silent := append(slices.Clone(lives), lifetime{PID: 13, Started: 401, Killed: true},
		lifetime{Started: 420, Seen: []sighting{{To: 450, State: "active", Epoch: 6, Line: true}, {To: 460, State: "closed", Epoch: 6, Line: true}}})
	rec := &recording{First: []uint64{9}, Last: []uint64{1}, End: 500, Lives: silent, Left: []dirtyOwner{{13, 5}},
		Events: []event{w(3, 1, ok, 430, 431)}}
	if got := rec.judge(); len(got) != 0 {
		t.Errorf("an owner that said nothing: %q", got)
	}
	rec.Events[0].From, rec.Events[0].To = 455, 456
	if got := rec.judge(); len(got) != 1 {
		t.Errorf("a late write of an owner that said nothing: %q", got)
	}
}
