package main

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// Programs. The better of the peers is what the goals are ratios to.
const (
	programOurs   = "nbd-export"
	programQEMU   = "qemu-nbd"
	programNbdkit = "nbdkit"
	programLimit  = "limit"
)

// server is a program in one of its modes.
type server struct {
	name    string // as in tables; ours without a mode is what the goals are for
	program string
	media   []string // empty: all
	argv    func(e endpoint) []string
	bare    bool // it needs no image
}

// endpoint is where a server is and what it serves.
type endpoint struct {
	binary    string // the program's file
	image     string
	size      int64
	medium    string
	transport string
	address   string // socket path or port
}

func (e endpoint) uri() string {
	if e.transport == "tcp" {
		return "nbd://127.0.0.1:" + e.address
	}
	return "nbd+unix:///?socket=" + e.address
}

// dial connects to where the server is to be.
func (e endpoint) dial() (net.Conn, error) {
	if e.transport == "tcp" {
		return net.Dial("tcp", "127.0.0.1:"+e.address)
	}
	return net.Dial("unix", e.address)
}

// either is u on a Unix socket and t on TCP.
func (e endpoint) either(u, t []string) []string {
	if e.transport == "tcp" {
		return t
	}
	return u
}

// shown is argv for people, without the places of this run.
func (e endpoint) shown(argv []string) string {
	s := slices.Clone(argv)
	s[0] = filepath.Base(s[0])
	for i, a := range s {
		switch a {
		case e.image:
			s[i] = "$IMAGE"
		case e.address:
			s[i] = "$SOCKET"
			if e.transport == "tcp" {
				s[i] = "$PORT"
			}
		}
	}
	return strings.Join(s, " ")
}

// allServers are the servers to compare; ours has engines to choose from, or not.
func allServers(engines bool) []server {
	all := []server{
		{programLimit, programLimit, []string{onTmpfs}, limitArgv, true},
		{programOurs, programOurs, nil, oursArgv(""), false},
		{"qemu-nbd/threads", programQEMU, nil, qemuArgv("threads"), false},
		{"qemu-nbd/io_uring", programQEMU, nil, qemuArgv("io_uring"), false},
		{"qemu-nbd/native", programQEMU, []string{onDirect}, qemuArgv("native"), false},
		{programNbdkit, programNbdkit, nil, nbdkitArgv, false},
	}
	if engines {
		all = slices.Insert(all, 2,
			server{"nbd-export/portable", programOurs, nil, oursArgv("portable"), false},
			server{"nbd-export/uring", programOurs, nil, oursArgv("uring"), false})
	}
	return all
}

func oursArgv(engine string) func(endpoint) []string {
	return func(e endpoint) []string {
		v := []string{e.binary, "serve", "-f", "raw"}
		if e.medium == onDirect {
			v = append(v, "--cache", "none")
		}
		if engine != "" {
			v = append(v, "--engine", engine)
		}
		v = append(v, e.either([]string{"-k", e.address}, []string{"-b", "127.0.0.1", "-p", e.address})...)
		return append(v, e.image)
	}
}

// qemuArgv has its best cache mode for the medium; native wants O_DIRECT.
func qemuArgv(aio string) func(endpoint) []string {
	return func(e endpoint) []string {
		cache := "writeback"
		if e.medium == onDirect {
			cache = "none"
		}
		v := []string{e.binary, "-t", "-e", "0", "-f", "raw", "--cache=" + cache, "--aio=" + aio}
		v = append(v, e.either([]string{"-k", e.address}, []string{"-b", "127.0.0.1", "-p", e.address})...)
		return append(v, e.image)
	}
}

// nbdkitArgv: its file plugin has no O_DIRECT; cache=none drops what it used.
func nbdkitArgv(e endpoint) []string {
	v := []string{e.binary, "-f"}
	v = append(v, e.either([]string{"-U", e.address}, []string{"-i", "127.0.0.1", "-p", e.address})...)
	v = append(v, "file", e.image)
	if e.medium == onDirect {
		v = append(v, "cache=none")
	}
	return v
}

func limitArgv(e endpoint) []string {
	address := e.address
	if e.transport == "tcp" {
		address = "127.0.0.1:" + address
	}
	return []string{e.binary, limitArg, e.transport, address, strconv.FormatInt(e.size, 10)}
}

// serves says whether s is for a medium.
func (s server) serves(medium string) bool {
	return len(s.media) == 0 || slices.Contains(s.media, medium)
}

// isPeer says whether a server of this name is one that we are held against.
func isPeer(name string) bool {
	program, _, _ := strings.Cut(name, "/")
	return program == programQEMU || program == programNbdkit
}

// choose takes those servers that are wanted, by name or program; all if
// wanted is empty.
func choose(all []server, wanted []string) ([]server, error) {
	if len(wanted) == 0 {
		return all, nil
	}
	var chosen []server
	found := map[string]bool{}
	for _, s := range all {
		for _, w := range wanted {
			if w == s.name || w == s.program {
				found[w] = true
				if len(chosen) == 0 || chosen[len(chosen)-1].name != s.name {
					chosen = append(chosen, s)
				}
			}
		}
	}
	for _, w := range wanted {
		if !found[w] {
			return nil, fmt.Errorf("--servers: no server %q", w)
		}
	}
	return chosen, nil
}

// findPrograms finds the files of the programs that servers need.
func findPrograms(servers []server, ours string) (map[string]string, error) {
	files := map[string]string{}
	for _, s := range servers {
		if files[s.program] != "" {
			continue
		}
		var file string
		var err error
		switch s.program {
		case programLimit:
			file, err = os.Executable()
		case programOurs:
			if file, err = filepath.Abs(ours); err == nil {
				_, err = os.Stat(file)
			}
			if err != nil {
				err = fmt.Errorf("%w; make build makes it", err)
			}
		default:
			if file, err = exec.LookPath(s.program); err != nil {
				err = fmt.Errorf("%w; make peers installs it", err)
			}
		}
		if err != nil {
			return nil, err
		}
		files[s.program] = file
	}
	return files, nil
}

// hasEngines says whether our program has engines to choose from.
func hasEngines(ours string) bool {
	out, err := exec.Command(ours, "serve", "--help").CombinedOutput()
	return err == nil && strings.Contains(string(out), "--engine ")
}
