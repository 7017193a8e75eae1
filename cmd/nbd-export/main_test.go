package main

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// The test binary is nbd-export itself if asked to be.
func init() {
	if os.Getenv("NBD_EXPORT_TEST_MAIN") != "" {
		main()
	}
}

func TestUsage(t *testing.T) {
	for _, c := range []struct {
		args   string
		status int
		want   string
	}{
		{"", 2, "no verb given; see nbd-export --help"},
		{"nope", 2, `there is no verb "nope"; see nbd-export --help`},
		{"sttus", 2, `there is no verb "sttus"; did you mean status?; see nbd-export --help`},
		{"--nope", 2, "unknown flag: --nope; see nbd-export --help"},
		{"serve --sokcet a b", 2, "unknown flag: --sokcet; did you mean --socket?; see nbd-export serve --help"},
		{"serve --exportname a b", 2, "unknown flag: --exportname; did you mean --export-name?; see"},
		{"serve --handover b", 2, "unknown flag: --handover; did you mean --handover-dirty?; see"},
		{"serve --vwxyz b", 2, "unknown flag: --vwxyz; see"},
		{"serve -n b", 2, "unknown shorthand flag: 'n' in -n: it is --cache none; see"},
		{"serve --tls-creds a b", 2, "unknown flag: --tls-creds: it is --tls-certificates DIR of serve"},
		{"serve --tls-clients any b", 2, "serve: --tls-clients is of use only with --tls-certificates; see"},
		{"serve --tls-certificates= b", 2, "serve: --tls-certificates needs a path; see"},
		{"serve -p 0 --tls-certificates /no/such b", 1, "TLS certificates in /no/such: server-cert.pem: no such file or directory"},
		{"serve -c /dev/nbd0 b", 2, "nbd-client -unix SOCKET /dev/nbdN"},
		{"status --object a", 2, "unknown flag: --object; see nbd-export status --help"},
		{"serve -t", 2, "serve needs one argument, IMAGE; see"}, // it is no wrong use by itself
		{"serve --discard maybe x", 2, "must be one of unmap, ignore; see"},
		{"status --nope", 2, "unknown flag: --nope; see nbd-export status --help"},
		{"status", 2, "status needs --control CTL; see nbd-export status --help"},
		{"status --control", 2, "flag needs an argument: --control; see nbd-export status --help"},
		{"status x --control /x", 2, `status takes no argument, but got "x"; see nbd-export status --help`},
		{"status --control /no/such", 1, `no server answers at /no/such: no such file or directory; is "nbd-export serve --control /no/such" running?`},
		{"activate --abandon --control /x", 2, "unknown flag: --abandon; see nbd-export activate --help"},
		{"activate --control /no/such", 1, "no server answers at /no/such: "},
		{"inactivate --control /x --control /y", 2, "it is given already, as /x, and may be given once; see nbd-export inactivate --help"},
		{"handover --from /x --to /y --to /z", 2, "it is given already, as /y, and may be given once; see nbd-export handover --help"},
		{"serve -x a -x b y", 2, `invalid argument "b" for "-x, --export-name" flag: it is given already, as a, and may be given once; see`},
		{"serve -p 1 --port 2 y", 2, "it is given already, as 1, and may be given once; see"},
		{"serve --socket= -k b y", 2, `it is given already, as "", and may be given once; see`},
		{"daemon --control a --control b", 2, "it is given already, as a, and may be given once; see"},
		{"who --owner-record a --owner-record b y", 2, "it is given already, as a, and may be given once; see"},
		{"serve --log-level debug --log-level warn -p 0 /no/such", 1, "open image /no/such: "}, // the last one counts
		{"inactivate --control unix:/no/such", 1, "no server answers at /no/such: "},
		{"serve", 2, "serve needs one argument, IMAGE; see nbd-export serve --help"},
		{"serve a b", 2, `serve takes one argument, IMAGE, but got "b" too; see`},
		{"serve --cache some x", 2, "must be one of writeback, none, writethrough; see"},
		{"serve -f vmdk x", 2, "must be one of auto, raw, qcow2; see"},
		{"serve -p 70000 x", 2, "serve: --port 70000 is not between 0 and 65535; see"},
		{"serve -p x x", 2, `invalid argument "x" for "-p, --port" flag: not a number; see`},
		{"serve -p 99999999999999999999 x", 2, `flag: too large or too small a number; see`},
		{"bench --rate x nbd://h", 2, `invalid argument "x" for "--rate" flag: not a number; see`},
		{"bench --time x nbd://h", 2, `invalid argument "x" for "--time" flag: not a time such as 500ms, 10s or 2m; see`},
		{"bench --discard --verify nbd://h", 2, "bench: what is discarded cannot be verified"},
		{"bench nbd+unix:///?socket=/no/such", 1, "bench: dial unix /no/such: connect: no such file or directory; is a server listening there?"},
		{"completion", 2, "completion needs the name of a shell: bash, fish, powershell or zsh; see nbd-export completion --help"},
		{"completion ksh", 2, `completion is for bash, fish, powershell or zsh, but got "ksh"; see`},
		{"create /no/such/x 1M", 1, "create image /no/such/x: no such file or directory; its directory has to exist"},
		{"create -f qcow2 -o foo=1 x 1M", 2, "create: -o foo=1: there is no such option; -o help lists them; see nbd-export create --help"},
		{"serve -e -1 x", 2, "serve: --shared -1 is negative; 0 means unlimited; see"},
		{"serve --full-disk-wait -1s x", 2, "serve: --full-disk-wait -1s is negative; 0 does not wait; see"},
		{"serve --memory 12q x", 2, `size "12q": unknown unit`},
		{"serve --memory 1.5q x", 2, `size "1.5q": unknown unit, want a number of bytes such as 512, 4k, 64M, 1.5G or 1T`},
		{"serve --memory 0.5M x", 2, "serve: --memory 512k is too little; give at least 1M; see"},
		{"serve --memory 12 x", 2, "serve: --memory 12 is too little; give at least 1M; see"},
		{"serve --log-level loud x", 2, "must be one of info, debug, warn, error; see"},
		{"serve --control= x", 2, "serve: --control needs a path; see"},
		{"serve --pid-file= x", 2, "serve: --pid-file needs a path; see"},
		{"serve -k x --control x y", 2, "serve: --socket and --control are both x; they are two sockets; see"},
		{"serve -x " + strings.Repeat("x", 4097) + " y", 2, `serve: export name "` + strings.Repeat("x", 64) + `"...: longer than 4096 bytes; see`},
		{"serve -D " + strings.Repeat("x", 4097) + " y", 2, `serve: description of export "": longer than 4096 bytes; see`},
		{"serve -p 0 -b [127.0.0.1] /no/such", 1, "open image /no/such: "},
		{"serve -b 300.1.1.1 y", 1, "cannot listen on TCP 300.1.1.1:10809: cannot resolve 300.1.1.1: no such host; give an address of this host"},
		{"serve --owner-record= x", 2, "serve: --owner-record needs a path, or off; see"},
		{"info --output xml x", 2, `invalid argument "xml" for "--output" flag: must be one of human, json; see`},
		{"check -f raw x", 1, "must be one of qcow2; see"},
		{"activate", 2, "activate needs --control CTL; see nbd-export activate --help"},
		{"activate --control x --node=", 2, "activate: --node needs the name of a node; leave it out to mean all; see nbd-export activate --help"},
		{"inactivate --control x --node y --node=", 2, "inactivate: --node needs the name of a node; leave it out to mean all; see"},
		{"inactivate --control x --timeout 0s", 2, "inactivate: --timeout 0s is not a time to wait; see"},
		{"handover --from x --to y --node=", 2, "handover: --node needs the name of a node; leave it out to mean all; see"},
		{"activate --control /no/such", 1, "no server answers at /no/such: no such file or directory; is "},
		{"stop --control x", 2, `there is no verb "stop"; see nbd-export --help`},
		{"stat --json", 2, `there is no verb "stat"; did you mean status?; see`},
		{"--json", 2, "unknown flag: --json; see nbd-export --help"},
		{"help nope", 2, `there is no verb "nope"; see nbd-export help --help`},
		{"help serve nope", 2, `there is no verb "serve nope"; see`},
		{"who", 2, "who needs one argument, IMAGE; see nbd-export who --help"},
		{"who --owner-record= x", 2, "who: --owner-record needs a path, or off; see"},
		{"who /no/such", 1, "/no/such: no such file or directory"},
		{"version x", 2, `version takes no argument, but got "x"; see nbd-export version --help`},
		{"man", 2, "man needs one argument, DIR; see nbd-export man --help"},
		{"man /no/such", 1, "cannot write the man pages: "},
	} {
		root := newRootCommand(nil)
		var out, errOut bytes.Buffer
		root.SetOut(&out)
		root.SetErr(&errOut)
		status := run(root, strings.Fields(c.args))
		text := errOut.String()
		if status != c.status || !strings.HasPrefix(text, "nbd-export: ") || !strings.Contains(text, c.want) ||
			strings.Count(text, "\n") != 1 || out.Len() > 0 {
			t.Errorf("%q: exit %d, %q, %q; want %d, %q", c.args, status, out.String(), text, c.status, c.want)
		}
	}
}

// Every verb has help with an example, and there are man pages and completions.
func TestHelp(t *testing.T) {
	dir := t.TempDir()
	for _, args := range []string{
		"--help", "serve --help", "activate --help", "inactivate --help", "status --help", "who --help", "bench --help", "demo --help",
		"version --help", "man --help", "completion bash", "version", "man " + dir,
	} {
		root := newRootCommand(nil)
		var out, errOut bytes.Buffer
		root.SetOut(&out)
		root.SetErr(&errOut)
		if status := run(root, strings.Fields(args)); status != 0 || errOut.Len() > 0 {
			t.Errorf("%s: exit %d, %s", args, status, errOut.String())
		}
		if strings.HasSuffix(args, "--help") && !strings.Contains(out.String(), "Examples:\n  ") {
			t.Errorf("%s shows no example", args)
		}
	}
	if _, err := os.Stat(filepath.Join(dir, "nbd-export-serve.1")); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(filepath.Join(dir, "nbd-export-man.1")); err == nil {
		t.Error("man, which is hidden, has a page")
	}
}

// What qemu-img takes is taken by the verbs that are called as there.
func TestOptionsOfQemuImg(t *testing.T) {
	image := filepath.Join(t.TempDir(), "disk.qcow2")
	ask := func(args ...string) string {
		t.Helper()
		root := newRootCommand(nil)
		var out, errOut bytes.Buffer
		root.SetOut(&out)
		root.SetErr(&errOut)
		if status := run(root, append(args, image)); status != 0 {
			t.Errorf("%s: exit %d, %s", args, status, errOut.String())
		}
		return out.String()
	}
	if root := newRootCommand(nil); run(root, []string{"create", image, "1M"}) != 0 {
		t.Fatal("no image")
	}
	for _, verb := range []string{"info", "map", "check"} {
		asJSON := ask(verb, "--json")
		for _, args := range [][]string{{verb, "--output=json"}, {verb, "--output", "json", "-f", "qcow2"}} {
			if got := ask(args...); got != asJSON || !json.Valid([]byte(got)) {
				t.Errorf("%s: %s\nand --json: %s", args, got, asJSON)
			}
		}
		if got, want := ask(verb, "--output", "human"), ask(verb); got != want || got == asJSON {
			t.Errorf("%s --output human: %s", verb, got)
		}
	}
	if got, want := ask("check", "-r", "leaks"), ask("check"); got != want {
		t.Errorf("check -r: %s, want %s", got, want)
	}
}

func TestEdits(t *testing.T) {
	for _, c := range []struct {
		a, b string
		want int
	}{
		{"", "", 0}, {"", "abc", 3}, {"abc", "", 3}, {"abc", "abc", 0}, {"abc", "abd", 1}, {"abc", "acb", 1},
		{"socket", "sokcet", 1}, {"port", "portt", 1}, {"port", "prt", 1}, {"abc", "xyz", 3}, {"ab", "ba", 1}, {"abcd", "badc", 2},
	} {
		if got := edits(c.a, c.b); got != c.want {
			t.Errorf("edits(%q, %q) is %d, want %d", c.a, c.b, got, c.want)
		}
	}
}
