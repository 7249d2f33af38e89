# An echo on Perl's Net::Server::PreFork, a process for each client: prefork.pl PORT PROCESSES.
package Echo;
use strict;
use warnings;
use base 'Net::Server::PreFork';

sub process_request {
    my $self = shift;
    my $data;
    while (sysread(STDIN, $data, 65536)) { syswrite(STDOUT, $data) }
}

my ($port, $processes) = @ARGV;
Echo->run(
    host => '127.0.0.1', port => $port, ipv => 4, listen => 4096, log_level => 0, max_requests => 1_000_000,
    min_servers => $processes, max_servers => $processes + 2, min_spare_servers => 1, max_spare_servers => $processes + 1,
);
