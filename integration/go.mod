module github.com/nbd-export/nbd-export/integration

go 1.26.0

require (
	github.com/anishathalye/porcupine v1.3.1
	github.com/nbd-export/nbd-export v0.0.0
	github.com/pojntfx/go-nbd v0.3.2
	golang.org/x/sys v0.49.0
)

require github.com/pilebones/go-udev v0.9.0 // indirect

replace github.com/nbd-export/nbd-export => ../
