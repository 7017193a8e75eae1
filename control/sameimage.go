package control

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	mrand "math/rand/v2"
	"slices"
	"strings"
	"time"
)

// Prover is a side whose images are compared with another's: a *Client for a
// server elsewhere, a *Registry for this process.
type Prover interface {
	// Identify says what the side knows of the images with these nodes, or of
	// all if none is named. If nonce is not "" it is first written into the
	// owner records of those that the side owns, as NONCE/NODE. Nothing else
	// changes. An *Error is an answer.
	Identify(ctx context.Context, nonce string, nodes ...string) ([]Identity, error)
}

// Proof says how two sides are known to have one image.
type Proof string

const (
	// ProofRecord: one side has read beside its image what the owner wrote
	// beside its own just now; or, where nobody owns it, what the last owner
	// wrote for a handover.
	ProofRecord Proof = "owner record"
	// ProofInode: both have the same file open, under one kernel.
	ProofInode Proof = "device and inode"
	// ProofAssumed: the user says so.
	ProofAssumed Proof = "assumed"
)

// Pair is an image that two sides have.
type Pair struct {
	A, B  Identity
	Proof Proof
}

const (
	// lagLimit is how long a network file system may show an old record;
	// lagPause is between two looks.
	lagLimit = 5 * time.Second
	lagPause = 50 * time.Millisecond
	// proofTries is how often a proof begins anew that another one's word has
	// disturbed, and proofPause how long it waits before, at most.
	proofTries = 5
	proofPause = 50 * time.Millisecond
)

// SameImages finds for each image of a, or those with these nodes, the one of
// b that is the same, proven through the storage, and sees that both have one
// format and size. Which side owns the image does not matter. With assume,
// images for which there is no proof, and no disproof, are matched by node
// name if nodes are named, or an export has none that is known, else by export
// name, or as the only ones of both.
//
// It changes nothing but the nonce in owner records. It blocks for as long as
// the storage of either side does, or until ctx ends.
func SameImages(ctx context.Context, a, b Prover, assume bool, nodes ...string) ([]Pair, error) {
	for try := 1; ; try++ {
		p := proof{a: a, b: b, nonce: rand.Text()}
		pairs, err := p.run(ctx, assume, nodes)
		if err == nil || ctx.Err() != nil || !p.overwritten(ctx) {
			return pairs, err
		}
		if try == proofTries {
			return nil, fmt.Errorf("%w; somebody else has it proven at the same time, which hides what the owner wrote: %w", err, errBusy)
		}
		select {
		case <-time.After(mrand.N(proofPause)):
		case <-ctx.Done():
			return nil, fmt.Errorf("%w (%w)", err, context.Cause(ctx))
		}
	}
}

// proof is one try of SameImages.
type proof struct {
	a, b   Prover
	nonce  string
	as, bs []Identity
}

// The owners of either side note different words.
func (p *proof) nonceA() string { return p.nonce + "-a" }
func (p *proof) nonceB() string { return p.nonce + "-b" }

func (p *proof) run(ctx context.Context, assume bool, nodes []string) (pairs []Pair, err error) {
	if p.as, err = p.a.Identify(ctx, p.nonceA(), nodes...); err != nil {
		return nil, err
	}
	answer := ""
	if slices.ContainsFunc(p.as, func(i Identity) bool { return !i.Noted }) {
		answer = p.nonceB() // it may own what a does not
	}
	if p.bs, err = p.b.Identify(ctx, answer); err != nil {
		return nil, err
	}
	if len(p.as) == 0 {
		return nil, errors.New("there is no image to compare")
	}
	for until := time.Now().Add(lagLimit); ; {
		if slices.ContainsFunc(p.bs, func(i Identity) bool { return i.Noted }) {
			// What b wrote a has not seen yet.
			if p.as, err = reread(ctx, p.a, p.as); err != nil {
				return nil, err
			}
		}
		pairs, err := match(p.as, p.bs, nodes, assume)
		if err == nil {
			return pairs, nil
		}
		if !slices.ContainsFunc(slices.Concat(p.as, p.bs), func(i Identity) bool { return i.Lags }) || time.Now().After(until) {
			return nil, err
		}
		select {
		case <-time.After(lagPause):
		case <-ctx.Done():
			return nil, fmt.Errorf("%w (%w)", err, context.Cause(ctx))
		}
		if p.as, err = reread(ctx, p.a, p.as); err != nil {
			return nil, err
		}
		if p.bs, err = reread(ctx, p.b, p.bs); err != nil {
			return nil, err
		}
	}
}

// overwritten reports whether another proof has put its word where ours was, or
// was about to when neither side owned the image: a record has room for one, and
// several exporters may want an image at once.
func (p *proof) overwritten(ctx context.Context) bool {
	look := func(side Prover, was []Identity, nonce string) bool {
		was = slices.DeleteFunc(slices.Clone(was), func(i Identity) bool { return !i.Noted })
		if len(was) == 0 {
			return false
		}
		now, err := reread(ctx, side, was)
		return err == nil && slices.ContainsFunc(now, func(i Identity) bool {
			return i.Active && i.RecordError == "" && i.Nonce != noteFor(nonce, i.Node)
		})
	}
	if look(p.a, p.as, p.nonceA()) || look(p.b, p.bs, p.nonceB()) {
		return true
	}
	for i := range p.as {
		for j := range p.bs {
			if a, b := &p.as[i], &p.bs[j]; a.oneOwner(b) && a.Nonce != b.Nonce {
				return true
			}
		}
	}
	return false
}

// oneOwner reports whether two sides that do not own it read a record of the same
// ownership.
func (i *Identity) oneOwner(o *Identity) bool {
	return !i.Active && !o.Active && i.Epoch != 0 && i.Epoch == o.Epoch && i.Since.Equal(o.Since)
}

// reread looks again at what a side has; what it noted stays noted.
func reread(ctx context.Context, p Prover, was []Identity) ([]Identity, error) {
	names := make([]string, len(was))
	for i, w := range was {
		names[i] = w.Node
	}
	now, err := p.Identify(ctx, "", names...)
	for i := range now {
		now[i].Noted = slices.ContainsFunc(was, func(w Identity) bool { return w.Node == now[i].Node && w.Noted })
	}
	return now, err
}

// prove tells whether a and b are one image; why is what disproves it, "" if
// nothing does.
func prove(a, b *Identity) (proof Proof, why string) {
	if a.BootID != "" && a.BootID == b.BootID && (a.Dev != 0 || a.Ino != 0) && a.Dev == b.Dev && a.Ino == b.Ino {
		proof = ProofInode // the nonce says more, where there is one
	}
	owner, other := a, b
	if b.Noted {
		owner, other = b, a
	}
	switch {
	case owner.Noted && other.Nonce == owner.Nonce:
		return ProofRecord, ""
	case proof != "":
		return proof, ""
	case a.Noted && b.Noted:
		return "", "each side owns its own"
	case owner.Noted && other.Record != "":
		return "", fmt.Sprintf("what the owner wrote into %s does not stand in %s", owner.Record, other.Record)
	case a.Nonce != "" && a.Nonce == b.Nonce && a.oneOwner(b):
		return ProofRecord, ""
	}
	return "", ""
}

// match pairs each of as with one of bs.
func match(as, bs []Identity, nodes []string, assume bool) ([]Pair, error) {
	pairs := make([]Pair, 0, len(as))
	taken := make([]bool, len(bs))
	for i := range as {
		a := &as[i]
		p := Pair{A: *a}
		for j := range bs {
			if proof, _ := prove(a, &bs[j]); proof != "" && !taken[j] {
				p.B, p.Proof, taken[j] = bs[j], proof, true
				break
			}
		}
		pairs = append(pairs, p)
	}
	for i := range pairs {
		p := &pairs[i]
		if p.Proof == "" {
			j := namesake(&p.A, bs, len(as), nodes)
			if j < 0 || taken[j] {
				return nil, fmt.Errorf("no image of the other side is proven to be %s (node %s)%s", p.A.Image, p.A.Node, reasons(&p.A, bs))
			}
			_, why := prove(&p.A, &bs[j])
			switch {
			case why != "":
				return nil, fmt.Errorf("%s (node %s) and %s (node %s) are not the same image: %s; give both exporters the same image and the same owner record",
					p.A.Image, p.A.Node, bs[j].Image, bs[j].Node, why)
			case !assume:
				return nil, fmt.Errorf("it cannot be proven that %s (node %s) and %s (node %s) are the same image: %s; if you know that they are, give --assume-same-image",
					p.A.Image, p.A.Node, bs[j].Image, bs[j].Node, noProof(&p.A, &bs[j]))
			}
			p.B, p.Proof, taken[j] = bs[j], ProofAssumed, true
		}
		for _, s := range []*Identity{&p.A, &p.B} {
			if s.Active && s.RecordError != "" { // its owner is in trouble
				return nil, fmt.Errorf("%s (node %s): %s", s.Image, s.Node, s.RecordError)
			}
		}
		if err := p.alike(); err != nil {
			return nil, err
		}
	}
	return pairs, nil
}

// namesake is which of bs a could be by its name, -1 for none.
func namesake(a *Identity, bs []Identity, of int, nodes []string) int {
	same := func(is func(b *Identity) bool) int {
		found := -1
		for j := range bs {
			if is(&bs[j]) {
				if found >= 0 {
					return -1
				}
				found = j
			}
		}
		return found
	}
	if of == 1 && len(bs) == 1 {
		return 0
	}
	if len(nodes) > 0 {
		return same(func(b *Identity) bool { return b.Node == a.Node })
	}
	return same(func(b *Identity) bool {
		if a.Export == "" || b.Export == "" { // QEMU's daemon does not tell
			return b.Node == a.Node
		}
		return b.Export == a.Export
	})
}

// noProof says why there is none.
func noProof(a, b *Identity) string {
	switch {
	case a.RecordError != "":
		return a.RecordError
	case b.RecordError != "":
		return b.RecordError
	case a.Unnoted != "" || b.Unnoted != "":
		return cmp.Or(a.Unnoted, b.Unnoted)
	case a.Record == "" || b.Record == "":
		return "not both keep an owner record of it, and they do not show one file under one kernel"
	case !a.Active && !b.Active:
		return "neither owns it, so neither may write its owner record; activate it at one side first"
	}
	return "the owner record does not show it"
}

// reasons is what there is to choose from, for an error.
func reasons(a *Identity, bs []Identity) string {
	if len(bs) == 0 {
		return ": the other side has none"
	}
	var list []string
	for j := range bs {
		_, why := prove(a, &bs[j])
		if why == "" {
			why = noProof(a, &bs[j])
		}
		list = append(list, fmt.Sprintf("%s (node %s): %s", bs[j].Image, bs[j].Node, why))
		if len(list) == 3 && len(bs) > 3 {
			list = append(list, fmt.Sprintf("and %d more", len(bs)-3))
			break
		}
	}
	return ": " + strings.Join(list, "; ") + "; name those to compare with --node; if you know which it is, give both the same export name, or node name, and --assume-same-image"
}

// alike sees that both sides understand the image the same.
func (p *Pair) alike() error {
	switch {
	case p.A.Format != p.B.Format:
		return fmt.Errorf("%s is %s at one side (node %s) and %s at the other (node %s); give both exporters the same format", p.A.Image, p.A.Format, p.A.Node, p.B.Format, p.B.Node)
	case p.A.Size != p.B.Size:
		return fmt.Errorf("%s has %d bytes at one side (node %s) and %d at the other (node %s); restart the exporter that has the wrong size", p.A.Image, p.A.Size, p.A.Node, p.B.Size, p.B.Node)
	}
	return nil
}
