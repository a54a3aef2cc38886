// Streamer is a client of streaming URLs: it drives one as kubectl's libraries do, without an API server between.
//
//	streamer exec|attach [flags] URL          copies its input and output; exits with the remote exit code
//	streamer portforward [flags] URL [LOCAL:]REMOTE...
//	                                          prints "Forwarding from 127.0.0.1:LOCAL -> REMOTE"; ends with its input
//	streamer count URL PORT PATH BYTES        gets a file from a port; prints how many bytes came
//
// It exits with 125 when something other than the remote command failed.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"time"

	"k8s.io/apimachinery/pkg/util/httpstream"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/portforward"
	"k8s.io/client-go/tools/remotecommand"
	"k8s.io/client-go/transport/spdy"
	"k8s.io/client-go/util/exec"
)

const failed = 125

type options struct {
	transport  string
	protocol   string
	tty        bool
	stdin      bool
	size       string
	timeout    time.Duration
	disconnect time.Duration
	old        bool
	ca         string
}

func main() {
	if len(os.Args) < 2 {
		usage()
	}
	var o options
	flags := flag.NewFlagSet(os.Args[1], flag.ExitOnError)
	flags.StringVar(&o.transport, "transport", "spdy", "spdy, websocket; for portforward spdy, tunnel")
	flags.StringVar(&o.protocol, "protocol", "", "offer this protocol alone, v1 to v5 or a whole name")
	flags.BoolVar(&o.tty, "tty", false, "the remote side has a terminal")
	flags.BoolVar(&o.stdin, "stdin", false, "copy our input")
	flags.StringVar(&o.size, "size", "", "tell this terminal size, COLUMNSxROWS; several are told one after another, with commas between")
	flags.DurationVar(&o.timeout, "timeout", 0, "give up after this long")
	flags.DurationVar(&o.disconnect, "disconnect", 0, "leave after this long, with exit code 0")
	flags.BoolVar(&o.old, "old", false, "forward as clients before Kubernetes 1.32 do, which reset no stream")
	flags.StringVar(&o.ca, "ca", "", "trust what the authorities in this file have signed, and no other")
	_ = flags.Parse(os.Args[2:])
	if flags.NArg() < 1 {
		usage()
	}
	target, err := url.Parse(flags.Arg(0))
	if err == nil {
		switch os.Args[1] {
		case "exec", "attach":
			err = stream(target, o)
		case "portforward":
			err = forward(target, o, flags.Args()[1:])
		case "count":
			err = printCount(target, flags.Args()[1:])
		default:
			usage()
		}
	}
	var code exec.CodeExitError
	switch {
	case errors.As(err, &code):
		os.Exit(code.Code)
	case err != nil:
		fmt.Fprintln(os.Stderr, "streamer:", err)
		os.Exit(failed)
	}
}

func usage() {
	fmt.Fprintln(os.Stderr, "usage: streamer exec|attach|portforward|count [flags] URL [[LOCAL:]REMOTE...]")
	os.Exit(failed)
}

func stream(target *url.URL, o options) error {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	if o.timeout > 0 {
		ctx, cancel = context.WithTimeout(ctx, o.timeout)
		defer cancel()
	}
	executor, err := newExecutor(target, o)
	if err != nil {
		return err
	}
	streams := remotecommand.StreamOptions{Stdout: os.Stdout, Tty: o.tty}
	if o.stdin {
		streams.Stdin = os.Stdin
	}
	if !o.tty {
		streams.Stderr = os.Stderr
	}
	if o.size != "" {
		sizes, err := parseSizes(o.size)
		if err != nil {
			return err
		}
		streams.TerminalSizeQueue = sizes
	}
	if o.disconnect > 0 {
		time.AfterFunc(o.disconnect, func() { os.Exit(0) })
	}
	return executor.StreamWithContext(ctx, streams)
}

func newExecutor(target *url.URL, o options) (remotecommand.Executor, error) {
	config := &rest.Config{Host: target.Host, TLSClientConfig: rest.TLSClientConfig{CAFile: o.ca}}
	name := protocolName(o.protocol)
	switch o.transport {
	case "spdy":
		if name == "" {
			return remotecommand.NewSPDYExecutor(config, http.MethodPost, target)
		}
		transport, upgrader, err := spdy.RoundTripperFor(config)
		if err != nil {
			return nil, err
		}
		return remotecommand.NewSPDYExecutorForProtocols(transport, upgrader, http.MethodPost, target, name)
	case "websocket":
		if name == "" {
			return remotecommand.NewWebSocketExecutor(config, http.MethodGet, target.String())
		}
		return remotecommand.NewWebSocketExecutorForProtocols(config, http.MethodGet, target.String(), name)
	default:
		return nil, fmt.Errorf("no transport %q for a command", o.transport)
	}
}

func protocolName(short string) string {
	switch short {
	case "v1":
		return "channel.k8s.io"
	case "v2", "v3", "v4", "v5":
		return short + ".channel.k8s.io"
	default:
		return short
	}
}

// sizeQueue gives its sizes, one when it is asked, and then waits for ever.
type sizeQueue struct{ sizes []remotecommand.TerminalSize }

func (q *sizeQueue) Next() *remotecommand.TerminalSize {
	if len(q.sizes) == 0 {
		select {}
	}
	next := q.sizes[0]
	q.sizes = q.sizes[1:]
	return &next
}

func parseSizes(text string) (*sizeQueue, error) {
	var q sizeQueue
	for rest := text; rest != ""; {
		var s remotecommand.TerminalSize
		n, err := fmt.Sscanf(rest, "%dx%d", &s.Width, &s.Height)
		if err != nil || n != 2 {
			return nil, fmt.Errorf("no terminal size: %q", text)
		}
		q.sizes = append(q.sizes, s)
		i := 0
		for i < len(rest) && rest[i] != ',' {
			i++
		}
		rest = rest[min(i+1, len(rest)):]
	}
	return &q, nil
}

func forward(target *url.URL, o options, ports []string) error {
	dialer, err := newDialer(target, o)
	if err != nil {
		return err
	}
	if o.old {
		dialer = oldDialer{dialer}
	}
	stop := make(chan struct{})
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		close(stop)
	}()
	forwarder, err := portforward.NewOnAddresses(dialer, []string{"127.0.0.1"}, ports, stop, nil, os.Stdout, os.Stderr)
	if err != nil {
		return err
	}
	return forwarder.ForwardPorts()
}

func newDialer(target *url.URL, o options) (httpstream.Dialer, error) {
	config := &rest.Config{Host: target.Host, TLSClientConfig: rest.TLSClientConfig{CAFile: o.ca}}
	switch o.transport {
	case "spdy":
		transport, upgrader, err := spdy.RoundTripperFor(config)
		if err != nil {
			return nil, err
		}
		return spdy.NewDialer(upgrader, &http.Client{Transport: transport}, http.MethodPost, target), nil
	case "tunnel":
		return portforward.NewSPDYOverWebsocketDialer(target, config)
	default:
		return nil, fmt.Errorf("no transport %q for ports", o.transport)
	}
}

// oldDialer is that of a client before 1.32: its connections have ended when the other side has closed both streams.
type oldDialer struct{ httpstream.Dialer }

func (d oldDialer) Dial(protocols ...string) (httpstream.Connection, string, error) {
	connection, protocol, err := d.Dialer.Dial(protocols...)
	if err != nil {
		return nil, "", err
	}
	return oldConnection{connection}, protocol, nil
}

type oldConnection struct{ httpstream.Connection }

func (c oldConnection) CreateStream(headers http.Header) (httpstream.Stream, error) {
	stream, err := c.Connection.CreateStream(headers)
	if err != nil {
		return nil, err
	}
	return oldStream{stream}, nil
}

type oldStream struct{ httpstream.Stream }

func (oldStream) Reset() error { return nil }
