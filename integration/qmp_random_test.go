package integration

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// Both daemons, given the same random commands, carry out and refuse the same, and have
// the same nodes and exports after each. What is wrong in two ways may be refused for
// either; the texts are for TestSameAnswers.
func TestSameRandomAnswers(t *testing.T) {
	const sequences = 150
	our, qemu := startManager(t, managers[0]), startManager(t, managers[1])
	for i := range sequences {
		p := &pairOfManagers{t: t, our: our, qemu: qemu, r: rand.New(rand.NewPCG(uint64(i), 1))}
		p.prepare()
		for range 8 + p.r.IntN(25) {
			if !p.step() {
				break
			}
		}
		p.clear()
		if t.Failed() {
			t.Fatalf("sequence %d:\n%s", i, strings.Join(p.said, "\n"))
		}
	}
	our.quit()
	qemu.q.send(`{"execute":"quit"}`)
}

// pairOfManagers gives both the same commands.
type pairOfManagers struct {
	t         *testing.T
	our, qemu *manager
	r         *rand.Rand
	said      []string
	there     []string // nodes that have a name
}

// imagesOfPair is how many images there are, each with nodes of its own: image 0, a raw
// one, has f0 and n0. Two nodes of one raw image both write it in QEMU, and not here.
const imagesOfPair = 3

func (p *pairOfManagers) prepare() {
	p.t.Helper()
	for _, m := range []*manager{p.our, p.qemu} {
		m.must(`nbd-server-start {"addr":{"type":"unix","data":{"path":"nbd"}}}`)
		for i := range imagesOfPair {
			path := filepath.Join(m.dir, fmt.Sprint(i))
			if err := os.RemoveAll(path); err != nil {
				p.t.Fatal(err)
			}
			if i%2 == 0 {
				m.image(fmt.Sprint(i), mib)
				continue
			}
			run(p.t, "qemu-img", "create", "-q", "-f", "qcow2", path, "1M")
			if err := os.Truncate(path, 256*kib); err != nil { // whole clusters
				p.t.Fatal(err)
			}
		}
	}
}

func (p *pairOfManagers) chance(percent int) bool { return p.r.IntN(100) < percent }

func (p *pairOfManagers) pick(of ...string) string { return of[p.r.IntN(len(of))] }

// flag is a member with a random value, or nothing.
func (p *pairOfManagers) flag(name string, percent int) string {
	if !p.chance(percent) {
		return ""
	}
	return fmt.Sprintf(`,"%s":%t`, name, p.chance(50))
}

// node is the name of a node, mostly of one that is there.
func (p *pairOfManagers) node() string {
	if len(p.there) > 0 && p.chance(80) {
		return p.pick(p.there...)
	}
	return p.pick("f", "n") + fmt.Sprint(p.r.IntN(imagesOfPair))
}

// command is a random one. Those whose answers differ on purpose are left out.
func (p *pairOfManagers) command() string {
	i := p.r.IntN(imagesOfPair)
	driver := "raw"
	if i%2 == 1 {
		driver = "qcow2"
	}
	// A qcow2 image cannot be written through a file that cannot be.
	readOnly := p.flag("read-only", 15)
	file := fmt.Sprintf(`{"driver":"file","node-name":"f%d","filename":"%d"%s%s}`, i, i, readOnly, p.flag("active", 40))
	switch p.r.IntN(13) {
	case 0, 1:
		return "blockdev-add " + file
	case 2, 3:
		return fmt.Sprintf(`blockdev-add {"driver":"%s","node-name":"n%d","file":"f%d","read-only":true%s}`, driver, i, i, p.flag("active", 40))
	case 4:
		return fmt.Sprintf(`blockdev-add {"driver":"%s","node-name":"n%d","file":%s%s%s}`, driver, i, file, readOnly, p.flag("active", 40))
	case 5:
		return fmt.Sprintf(`blockdev-del {"node-name":"%s"}`, p.node())
	case 6, 7:
		return fmt.Sprintf(`blockdev-set-active {"node-name":"%s","active":%t}`, p.node(), p.chance(50))
	case 8:
		return p.pick(`nbd-server-stop`, `nbd-server-start {"addr":{"type":"unix","data":{"path":"nbd"}}}`)
	case 9, 10:
		return fmt.Sprintf(`block-export-add {"type":"nbd","id":"e%d","node-name":"%s"%s%s%s}`, p.r.IntN(3), p.node(),
			p.pick("", `,"name":"x"`, `,"name":""`), p.flag("writable", 60), p.flag("allow-inactive", 60))
	case 11:
		return fmt.Sprintf(`block-export-del {"id":"e%d","mode":"%s"}`, p.r.IntN(3), p.pick("safe", "hard"))
	}
	return fmt.Sprintf(`block_resize {"node-name":"%s","size":%d}`, strings.Replace(p.node(), "f", "n", 1), (1+p.r.IntN(3))*mib)
}

// step gives a command, and reports whether the daemons can go on with the same.
func (p *pairOfManagers) step() bool {
	p.t.Helper()
	c := p.command()
	if strings.HasPrefix(c, "blockdev-set-active") && strings.Contains(c, `"active":false`) && p.halfActive() {
		return true // ours takes along a file node that QEMU leaves
	}
	p.said = append(p.said, c)
	ours, theirs := p.our.ask(c), p.qemu.ask(c)
	a, b := errorOf(ours), errorOf(theirs)
	p.said = append(p.said, "    "+a, "    "+b)
	switch {
	case b == "" && (strings.Contains(a, "nbd-export ") || strings.Contains(a, "cannot be made smaller")):
		return false // it says that it does not do that
	case (a == "") != (b == "") || strings.SplitN(a, ":", 2)[0] != strings.SplitN(b, ":", 2)[0]:
		p.t.Errorf("%s:\nours   %v\ntheirs %v", c, ours, theirs)
		return false
	case strings.HasPrefix(b, "GenericError: NBD server"):
		return false // QEMU may have activated the node for an export
	}
	for _, query := range []string{"query-named-block-nodes", "query-block-exports"} {
		list := p.our.ask(query)
		if query == "query-named-block-nodes" {
			p.there = namesIn(list)
		}
		ours, theirs := canonical(p.t, list), canonical(p.t, p.qemu.ask(query))
		if ours != theirs {
			p.t.Errorf("%s, then %s:\nours   %s\ntheirs %s", c, query, ours, theirs)
			return false
		}
	}
	return true
}

// namesIn are the names that clients gave to nodes.
func namesIn(answer map[string]any) (names []string) {
	list, _ := answer["return"].([]any)
	for _, n := range list {
		if name := fmt.Sprint(n.(map[string]any)["node-name"]); name[0] != '#' {
			names = append(names, name)
		}
	}
	return names
}

// halfActive says whether an active file node is under an inactive format node.
func (p *pairOfManagers) halfActive() bool {
	active := make(map[string]bool)
	list, _ := p.our.ask("query-named-block-nodes")["return"].([]any)
	for _, n := range list {
		n := n.(map[string]any)
		active[fmt.Sprint(n["node-name"])] = n["active"] == true
	}
	for i := range imagesOfPair {
		if format, there := active[fmt.Sprintf("n%d", i)]; there && !format && active[fmt.Sprintf("f%d", i)] {
			return true
		}
	}
	return false
}

// clear leaves both without nodes and exports, and compares what was told of these.
func (p *pairOfManagers) clear() {
	p.t.Helper()
	for _, m := range []*manager{p.our, p.qemu} {
		m.ask("nbd-server-stop")
		for i := range imagesOfPair {
			m.ask(fmt.Sprintf(`blockdev-del {"node-name":"n%d"}`, i))
			m.ask(fmt.Sprintf(`blockdev-del {"node-name":"f%d"}`, i))
		}
		for _, query := range []string{"query-named-block-nodes", "query-block-exports"} {
			if list, _ := m.ask(query)["return"].([]any); len(list) > 0 {
				p.t.Errorf("%s: %s: left %v", m.kind, query, list)
			}
		}
		m.events = nil
	}
	for i := range imagesOfPair {
		path := filepath.Join(p.our.dir, fmt.Sprint(i))
		wantLocks(p.t, path, nil)
		if files := holds(p.t, p.our.pid, path, false); len(files) > 0 {
			p.t.Errorf("%s is still open: %v", path, files)
		}
	}
}
