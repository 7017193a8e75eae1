package integration

import (
	"regexp"
	"strings"
	"testing"
	"time"
)

var verbs = []string{"serve", "daemon", "activate", "inactivate", "handover", "control-stdio", "status", "who", "info", "check", "create", "map", "bench", "demo", "version"}

func TestHelp(t *testing.T) {
	top := cli(t, "--help")
	if top.code != 0 || top.stderr != "" {
		t.Errorf("--help: exit status %d, %s", top.code, top.stderr)
	}
	for _, verb := range verbs {
		if !regexp.MustCompile(`(?m)^\s+` + verb + `\b`).MatchString(top.stdout) {
			t.Errorf("--help does not list %s:\n%s", verb, top.stdout)
		}
		r := cli(t, verb, "--help")
		if r.code != 0 || r.stderr != "" {
			t.Errorf("%s --help: exit status %d, %s", verb, r.code, r.stderr)
		}
		_, example, found := strings.Cut(r.stdout, "Example")
		if !found || !strings.Contains(example, "nbd-export "+verb) {
			t.Errorf("%s --help shows no example:\n%s", verb, r.stdout)
		}
	}
}

func TestServeHelpNamesEveryFlag(t *testing.T) {
	help := cli(t, "serve", "--help").stdout
	for _, flag := range []string{"-k, --socket", "-p, --port", "-b, --bind", "-x, --export-name", "-D, --description",
		"-f, --format", "-r, --read-only", "--inactive", "--control", "--pid-file", "--cache", "--locking",
		"--drop-cache", "--memory", "--engine", "-e, --shared", "--log-level", "--log-format"} {
		if !strings.Contains(help, flag) {
			t.Errorf("serve --help lacks %q", flag)
		}
	}
}

func TestVersion(t *testing.T) {
	want := cli(t, "version").stdout
	for _, arg := range []string{"version", "--version", "-V"} {
		r := cli(t, arg)
		if r.code != 0 || !strings.HasPrefix(r.stdout, "nbd-export ") || r.stdout != want {
			t.Errorf("%s: exit status %d, %q", arg, r.code, r.stdout)
		}
	}
}

func TestCompletion(t *testing.T) {
	for _, shell := range []string{"bash", "zsh", "fish"} {
		r := cli(t, "completion", shell)
		if r.code != 0 || !strings.Contains(r.stdout, "nbd-export") {
			t.Errorf("completion %s: exit status %d, %d bytes", shell, r.code, len(r.stdout))
		}
	}
	if r := cli(t, "completion", "bash"); tryRunInput(t, r.stdout, "bash", "-n").code != 0 {
		t.Error("bash does not understand its completion")
	}
}

func TestWrongUsage(t *testing.T) {
	image := sparseImage(t, t.TempDir(), mib)
	for _, args := range [][]string{
		{},
		{"no-such-verb"},
		{"serve"},
		{"daemon"},
		{"daemon", "--control", "ctl", image},
		{"serve", image, image},
		{"serve", ""},
		{"serve", "--no-such-flag", image},
		{"serve", "--cache", "sometimes", image},
		{"serve", "--locking", "maybe", image},
		{"serve", "--drop-cache", "perhaps", image},
		{"serve", "--format", "qcow7", image},
		{"serve", "--memory", "much", image},
		{"serve", "--engine", "steam", image},
		{"serve", "--memory", "-1", image},
		{"serve", "--memory", "99999999999999T", image},
		{"serve", "--port", "65536", image},
		{"serve", "--port", "http?", image},
		{"serve", "--shared", "-1", image},
		{"serve", "--log-level", "loud", image},
		{"serve", "--log-format", "xml", image},
		{"activate"},
		{"inactivate"},
		{"status"},
		{"status", "--control", "/tmp/none", "more"},
		{"activate", "--abandon", "--control", "/tmp/none"},
		{"inactivate", "--if-unchanged", "--control", "/tmp/none"},
		{"status", "--control", "/tmp/none", "--control", ""},
		{"control-stdio"},
		{"handover"},
		{"handover", "--from", "/tmp/none"},
		{"handover", "--from", "/tmp/none", "--to", "/tmp/none"},
		{"handover", "--from", "/tmp/none", "--to", "/tmp/nobody", "--timeout", "0s"},
		{"handover", "--from", "/tmp/none", "--to", "/tmp/nobody", "more"},
		{"bench"},
		{"bench", "--rw", "sideways", "nbd+unix:///?socket=/tmp/none"},
		{"bench", "--bs", "0", "nbd+unix:///?socket=/tmp/none"},
		{"bench", "--depth", "0", "nbd+unix:///?socket=/tmp/none"},
		{"bench", "http://localhost/"},
		{"demo", "more"},
	} {
		r := cli(t, args...)
		if r.code != 2 || r.stderr == "" || strings.Contains(r.stderr, "goroutine ") {
			t.Errorf("%q: exit status %d, want 2\nstdout: %s\nstderr: %s", args, r.code, r.stdout, r.stderr)
		} else if strings.Count(r.stderr, "\n") != 1 {
			t.Errorf("%q: not one line of standard error:\n%s", args, r.stderr)
		}
	}
}

// Verbs that talk to a server that is not there.
func TestNoServer(t *testing.T) {
	for _, args := range [][]string{
		{"activate", "--control", "/tmp/none/ctl"},
		{"inactivate", "--control", "/tmp/none/ctl"},
		{"status", "--control", "/tmp/none/ctl"},
		{"status", "--control", "exec:echo no way to /tmp/none/ctl >&2"},
		{"control-stdio", "/tmp/none/ctl"},
		{"handover", "--from", "/tmp/none/ctl", "--to", "/tmp/none/ctl2"},
	} {
		wantFailure(t, cli(t, args...), 1, "/tmp/none/ctl")
	}
	wantFailure(t, cli(t, "bench", "--time", "1s", "nbd+unix:///?socket=/tmp/none/nbd"), 1, "/tmp/none/nbd")
}

func TestDemo(t *testing.T) {
	begin := time.Now()
	r := cli(t, "demo")
	if r.code != 0 {
		t.Fatalf("exit status %d\n%s%s", r.code, r.stdout, r.stderr)
	}
	if took := time.Since(begin); took > 30*time.Second {
		t.Errorf("the demo took %v", took)
	}
	t.Log(r.stdout)
	for _, want := range []string{"acknowledged", "lost", "refused", "p50", "p99", "max"} {
		if !strings.Contains(strings.ToLower(r.stdout), want) {
			t.Errorf("the demo does not tell %q", want)
		}
	}
}

func TestBench(t *testing.T) {
	everyServer(t, func(t *testing.T, kind string) {
		s := startTarget(t, kind, sparseImage(t, tmpfsDir(t), 64*mib), targetOptions{name: "disk"})
		for _, rw := range []string{"read", "write", "randread", "randwrite", "mixed"} {
			args := []string{program(t), "bench", "--rw", rw, "--bs", "4k", "--depth", "16", "--conns", "2", "--time", "300ms", s.uri}
			out := run(t, append(args, "--gobench")...)
			if !regexp.MustCompile(`(?m)^Benchmark\S+\s+\d+\s+[\d.]+ ns/op`).MatchString(out) {
				t.Errorf("bench --rw %s prints no Go benchmark line:\n%s", rw, out)
			}
			out = run(t, args...)
			for _, want := range []string{"ops/s", "MiB/s", "p50", "p99", "p99.9", "max"} {
				if !strings.Contains(out, want) {
					t.Errorf("bench --rw %s does not print %s:\n%s", rw, want, out)
				}
			}
		}
		run(t, program(t), "bench", "--rw", "randwrite", "--verify", "--bs", "4k", "--depth", "16", "--conns", "2", "--time", "500ms", s.uri)
		run(t, program(t), "bench", "--rw", "write", "--verify", "--bs", "1M", "--depth", "4", "--time", "500ms", s.uri)
		run(t, program(t), "bench", "--rw", "randread", "--rate", "500", "--time", "500ms", s.uri)
	})
}

func TestBenchMeasuresTheServersCPU(t *testing.T) {
	e := serve(t, sparseImage(t, tmpfsDir(t), 64*mib))
	out := run(t, program(t), "bench", "--rw", "randwrite", "--time", "500ms", "--pid", e.pidString(), e.uri())
	if !regexp.MustCompile(`server processor time\s+[\d.]+ us/op`).MatchString(out) {
		t.Errorf("bench --pid tells nothing about CPU:\n%s", out)
	}
}
