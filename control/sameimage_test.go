package control

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/nbd-export/nbd-export/backend"
	"github.com/nbd-export/nbd-export/internal/testfs"
	"github.com/nbd-export/nbd-export/state"
)

// rawBed is a registry of real images, inactive, as long as the test runs.
func rawBed(t testing.TB, o backend.Options, paths ...string) *bed {
	t.Helper()
	b := &bed{Registry: &Registry{}}
	for i, path := range paths {
		o.Path, o.Format = path, "raw"
		img, err := backend.Open(o)
		if err != nil {
			t.Fatal(err)
		}
		err = b.Add(&Target{
			Node: fmt.Sprintf("image%d", i), Image: img, Machine: state.NewMachine(img, state.Options{Watch: time.Hour, ReadOnly: o.ReadOnly}),
			Export: Export{ID: fmt.Sprintf("export%d", i), Name: filepath.Base(path), Writable: !o.ReadOnly},
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() { _ = state.Stop(machines(b.Targets())...) })
	return b
}

func imageFiles(t testing.TB, n int) []string {
	t.Helper()
	dir := testfs.Memory(t)
	paths := make([]string, n)
	for i := range paths {
		paths[i] = filepath.Join(dir, fmt.Sprintf("disk%d", i))
		if err := os.WriteFile(paths[i], make([]byte, 4096*(i+1)), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return paths
}

func (b *bed) activate(t testing.TB, nodes ...string) {
	t.Helper()
	if err := b.Activate(context.Background(), state.ActivateOptions{}, nodes...); err != nil {
		t.Fatal(err)
	}
}

// One side is another process as far as it knows, the other is this one.
func TestSameImages(t *testing.T) {
	ctx := context.Background()
	paths := imageFiles(t, 3)
	here := rawBed(t, backend.Options{}, paths[2], paths[0])
	there := rawBed(t, backend.Options{}, paths...)
	there.activate(t, "image0", "image1")
	here.activate(t, "image0")
	peer := dial(t, there.listen(t, Config{}))

	pairs, err := SameImages(ctx, here, peer, false)
	if err != nil || len(pairs) != 2 {
		t.Fatalf("%v, %v", pairs, err)
	}
	for i, want := range []string{"image2", "image0"} {
		if p := pairs[i]; p.Proof != ProofRecord || p.B.Node != want || p.A.Image != p.B.Image || p.A.Nonce != p.B.Nonce {
			t.Errorf("pair %d: %+v", i, p)
		}
	}
	if pairs, err = SameImages(ctx, peer, here, false, "image0"); err != nil || len(pairs) != 1 || pairs[0].B.Node != "image1" {
		t.Errorf("%v, %v", pairs, err)
	}
	// What the other side does not have.
	if _, err = SameImages(ctx, peer, here, false); err == nil || !strings.Contains(err.Error(), paths[1]) {
		t.Error(err)
	}
	if _, err = SameImages(ctx, peer, here, false, "image7"); err == nil || !strings.Contains(err.Error(), "image7") {
		t.Error(err)
	}
	// Neither owns it: what was noted for the last handover still tells.
	if err := there.Inactivate(ctx, InactivateOptions{}); err != nil {
		t.Fatal(err)
	}
	pairs, err = SameImages(ctx, peer, here, false, "image0")
	if err != nil || pairs[0].A.Noted || pairs[0].B.Noted {
		t.Errorf("%+v, %v", pairs, err)
	}
	if _, err := peer.Identify(ctx, strings.Repeat("x", maxNonce+1)); err == nil {
		t.Error("a nonce of any length")
	}
	if _, err := peer.Identify(ctx, "a b"); err == nil {
		t.Error("a nonce of any characters")
	}
}

// An owner in trouble with one record can prove what it has else.
func TestSameImagesBadRecord(t *testing.T) {
	ctx := context.Background()
	paths := imageFiles(t, 2)
	owner, other := rawBed(t, backend.Options{}, paths...), rawBed(t, backend.Options{}, paths...)
	owner.activate(t)
	if err := os.WriteFile(paths[0]+".owner", []byte("scribble"), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, sides := range map[string][2]Prover{"owner asks": {owner, other}, "owner is asked": {other, owner}} {
		if pairs, err := SameImages(ctx, sides[0], sides[1], false, "image1"); err != nil || pairs[0].Proof != ProofRecord {
			t.Errorf("%s: %v, %v", name, pairs, err)
		}
		_, err := SameImages(ctx, sides[0], sides[1], false, "image0")
		if err == nil || !strings.Contains(err.Error(), "image0") || !strings.Contains(err.Error(), "this is no owner record") {
			t.Errorf("%s: %v", name, err)
		}
	}
	_ = state.Abandon(ctx, machines(owner.Targets())...)
}

// prove looks at identities alone.
func TestProve(t *testing.T) {
	now := time.Now()
	owner := Identity{Active: true, Noted: true, Nonce: "n/image0", Record: "/a.owner", Epoch: 3, Since: now}
	rest := Identity{Nonce: "m/image0", Record: "/a.owner", Epoch: 3, Since: now}
	file := Identity{BootID: "b", Dev: 1, Ino: 2}
	for name, c := range map[string]struct {
		a, b  Identity
		proof Proof
		why   string
	}{
		"read":             {owner, Identity{Nonce: "n/image0", Record: "/b.owner"}, ProofRecord, ""},
		"not read":         {owner, Identity{Record: "/b.owner"}, "", "does not stand in /b.owner"},
		"read another's":   {owner, Identity{Nonce: "n/image1", Record: "/b.owner"}, "", "does not stand"},
		"no record there":  {owner, Identity{}, "", ""},
		"two owners":       {owner, owner, ProofRecord, ""},
		"owners of others": {owner, Identity{Active: true, Noted: true, Nonce: "m/image0", Record: "/b.owner"}, "", "each side owns its own"},
		"one file":         {file, file, ProofInode, ""},
		"another boot":     {file, Identity{BootID: "c", Dev: 1, Ino: 2}, "", ""},
		"no boot":          {Identity{Dev: 1, Ino: 2}, Identity{Dev: 1, Ino: 2}, "", ""},
		"unknown file":     {Identity{BootID: "b"}, Identity{BootID: "b"}, "", ""},
		"hard link":        {Identity{Active: true, Noted: true, Nonce: "n", Record: "/a", BootID: "b", Ino: 1}, Identity{Record: "/b", BootID: "b", Ino: 1}, ProofInode, ""},
		"at rest":          {rest, rest, ProofRecord, ""},
		"at rest, others":  {rest, Identity{Nonce: "m/image0", Record: "/a.owner", Epoch: 4, Since: now}, "", ""},
		"no nonce":         {Identity{Record: "/a", Epoch: 1}, Identity{Record: "/a", Epoch: 1}, "", ""},
	} {
		for range 2 {
			if proof, why := prove(&c.a, &c.b); proof != c.proof || (why == "") != (c.why == "") || !strings.Contains(why, c.why) {
				t.Errorf("%s: %q, %q", name, proof, why)
			}
			c.a, c.b = c.b, c.a
		}
	}
}

// disturbed is a side whose owner is asked for another proof, so many times,
// before it looks.
type disturbed struct {
	*fakeSide
	owner *fakeSide
	times int
}

func (d *disturbed) Identify(ctx context.Context, nonce string, nodes ...string) ([]Identity, error) {
	if d.times > 0 {
		d.times--
		if _, err := d.owner.Identify(ctx, fmt.Sprint("other", d.times)); err != nil {
			return nil, err
		}
	}
	return d.fakeSide.Identify(ctx, nonce, nodes...)
}

// Two proofs at once do not refuse each other, whoever is the owner; what is
// another image is seen to be one all the same.
func TestSameImagesTwice(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newFakeStore(2)
		owner, other := newFakeSide("owner", s, true), newFakeSide("other", s, false)
		copied := newFakeSide("copy", newFakeStore(2), false)
		for times := range 4 {
			if _, err := SameImages(t.Context(), owner, &disturbed{other, owner, times}, false); err != nil {
				t.Errorf("the owner asks, disturbed %d times: %v", times, err)
			}
			if _, err := SameImages(t.Context(), &disturbed{other, owner, times}, owner, false); err != nil {
				t.Errorf("the owner is asked, disturbed %d times: %v", times, err)
			}
			if _, err := SameImages(t.Context(), owner, &disturbed{copied, owner, times}, false); err == nil {
				t.Error("a copy is taken for the image")
			}
		}
		// Nor those of two that do not own it, while the owner's word changes.
		third := newFakeSide("third", s, false)
		for times := range 4 {
			if _, err := SameImages(t.Context(), third, &disturbed{other, owner, times}, false); err != nil {
				t.Errorf("neither owns it, disturbed %d times: %v", times, err)
			}
		}
		_, err := SameImages(t.Context(), owner, &disturbed{other, owner, 1000}, false)
		if err == nil || !strings.Contains(err.Error(), "at the same time") {
			t.Errorf("disturbed for ever: %v", err)
		}
	})
}

// lagging shows the record of its storage only after a while.
type lagging struct {
	*fakeSide
	until time.Time
}

func (l *lagging) Identify(ctx context.Context, nonce string, nodes ...string) ([]Identity, error) {
	list, err := l.fakeSide.Identify(ctx, nonce, nodes...)
	for i := range list {
		list[i].Lags = true
		if time.Now().Before(l.until) {
			list[i].Nonce = "old"
		}
	}
	return list, err
}

func TestSameImagesOnSlowStorage(t *testing.T) {
	for _, lag := range []time.Duration{lagLimit / 2, 2 * lagLimit} {
		synctest.Test(t, func(t *testing.T) {
			s := newFakeStore(2)
			a, b := newFakeSide("a", s, true), newFakeSide("b", s, false)
			l := &lagging{b, time.Now().Add(lag)}
			pairs, err := SameImages(context.Background(), a, l, false)
			if (err == nil) != (lag < lagLimit) || err == nil && len(pairs) != 2 {
				t.Errorf("after %v: %v, %v", lag, pairs, err)
			}
			ctx, cancel := context.WithCancelCause(context.Background())
			stop := errors.New("stop")
			time.AfterFunc(lagLimit/10, func() { cancel(stop) })
			l.until = time.Now().Add(time.Hour)
			if _, err := SameImages(ctx, a, l, false); !errors.Is(err, stop) {
				t.Error(err)
			}
		})
	}
}

// Many real images move as one group.
func TestHandoverOfGroup(t *testing.T) {
	paths := imageFiles(t, 20)
	a, b := rawBed(t, backend.Options{}, paths...), rawBed(t, backend.Options{}, paths...)
	a.activate(t)
	pa, pb := NewPeer(a.listen(t, Config{})), NewPeer("unix:"+b.listen(t, Config{}))
	defer pa.Close()
	defer pb.Close()
	want := func(x *bed, s state.State) {
		t.Helper()
		for i := range paths {
			if got := x.state(i); got != s {
				t.Fatalf("image%d is %s, want %s", i, got, s)
			}
		}
	}
	ctx := context.Background()
	r := Handover(ctx, pa, pb, HandoverOptions{})
	if r.Outcome != HandoverMoved || len(r.Images) != 20 || r.To.State != "active" || r.From.State != "inactive" {
		t.Fatalf("%+v", r)
	}
	want(a, state.Inactive)
	want(b, state.Active)
	// One that cannot be had keeps all where they are.
	holder := rawBed(t, backend.Options{}, paths[13])
	if err := b.Inactivate(ctx, InactivateOptions{}); err != nil {
		t.Fatal(err)
	}
	holder.activate(t)
	r = Handover(ctx, pb, pa, HandoverOptions{})
	if r.Outcome == HandoverMoved {
		t.Fatalf("%+v", r)
	}
	want(a, state.Inactive)
	want(b, state.Inactive)
	if err := holder.Inactivate(ctx, InactivateOptions{}); err != nil {
		t.Fatal(err)
	}
	b.activate(t)
	if r = Handover(ctx, pb, pa, HandoverOptions{}); r.Outcome != HandoverMoved {
		t.Fatalf("%+v", r)
	}
	want(a, state.Active)
	want(b, state.Inactive)
}
